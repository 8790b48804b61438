import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dam_vllm.bench.model import DEMO, LONG, MODELS, write_model

# Numbers of parameters and fields of the public configurations, as they stand on the Hub.
PARAMETERS = {
    "llama-3.2-1b": 1235814400,
    "llama-3.1-8b": 8030261248,
    "qwen3-4b": 4022468096,
    "qwen3-8b": 8190735360,
}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "dtype": "bfloat16",
}  # fmt: skip
QWEN = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "dtype": "bfloat16",
    "num_hidden_layers": 36, "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FIELDS = {
    "llama-3.2-1b": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_parameters": ROPE | {"factor": 32.0},
    },
    "llama-3.1-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False, "rope_parameters": ROPE | {"factor": 8.0},
    },
    "qwen3-4b": QWEN | {
        "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True,
    },
    "qwen3-8b": QWEN | {
        "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_configurations_are_the_public_ones(tmp_path, name):
    config = json.loads((write_model(tmp_path, MODELS[name], 4096) / "config.json").read_text())
    assert {key: config[key] for key in FIELDS[name]} == FIELDS[name]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_counted_as_transformers_builds_them(tmp_path, name):
    config = AutoConfig.from_pretrained(write_model(tmp_path, MODELS[name], 4096))
    with torch.device("meta"):
        found = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    assert MODELS[name].weight_bytes == 2 * found
    assert found == PARAMETERS.get(name, found)


def test_a_token_of_the_cache():
    """Keys and values, 2 bytes each: 4 layers x 8 KV heads x 64 channels."""
    assert LONG.token_bytes == 2 * 2 * 4 * 8 * 64


@pytest.mark.parametrize(("name", "positions"), [("long", 50001), ("qwen3-4b", 50001),
                                                 ("llama-3.1-8b", 131072)])  # fmt: skip
def test_longer_requests_than_public_ones_have_positions(tmp_path, name, positions):
    config = AutoConfig.from_pretrained(write_model(tmp_path, MODELS[name], 50001))
    assert config.max_position_embeddings == positions


def test_the_tokenizer_fits_every_vocabulary(tmp_path):
    folder = write_model(tmp_path / "model", DEMO, 4096)
    tokens = len(AutoTokenizer.from_pretrained(folder))
    assert all(tokens <= model.vocabulary for model in MODELS.values())
