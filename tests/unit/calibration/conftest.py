"""Tiny models and texts."""

import json
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

WORDS = [f"w{index}" for index in range(60)]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "gqa": lambda: LlamaConfig(**SMALL),
    "mqa": lambda: LlamaConfig(**SMALL | {"num_key_value_heads": 1}),
    "mha": lambda: LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "sliding": lambda: MistralConfig(**SMALL, sliding_window=8),
    "gemma": lambda: Gemma2Config(
        **SMALL | {"num_hidden_layers": 4}, sliding_window=8, attn_logit_softcapping=5.0
    ),
}


def build(kind, implementation="eager"):
    """A random model whose attention is far from uniform."""
    from transformers import AutoModelForCausalLM

    set_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=implementation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed" in name:
                weight.normal_(std=0.6)
    return model.eval()


def save_tokenizer(folder):
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved Llama with 3 layers, 4 query and 2 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    build("gqa").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory):
    """JSONL: 20 texts of 30 to 90 words."""
    rng = Random(0)
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(30, 90))) for _ in range(20)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
