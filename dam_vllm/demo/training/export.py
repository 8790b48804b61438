"""Writes the trained network as a Hugging Face model folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dam_vllm.demo.training import tokenizer as vocabulary
from dam_vllm.demo.training.network import Network
from dam_vllm.demo.training.samples import MAX_POSITIONS


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Saves weights (bfloat16 safetensors), configuration, tokenizer and chat template.

    Args:
        network: the trained network.
        tokenizer: its tokenizer.
        folder: where to write; made if need be.
    """
    size = network.shape
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_size,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rms_norm_eps=size.norm_eps,
        pad_token_id=vocabulary.PAD,
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.EOS,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(_rename(network.state_dict()), strict=False)
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary.BOS,
        pad_token_id=vocabulary.PAD,
        eos_token_id=[vocabulary.EOS, vocabulary.END],
    )
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=vocabulary.SPECIAL[vocabulary.PAD],
        bos_token=vocabulary.SPECIAL[vocabulary.BOS],
        eos_token=vocabulary.SPECIAL[vocabulary.EOS],
        extra_special_tokens=list(vocabulary.SPECIAL[vocabulary.USER :]),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = vocabulary.CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {f"model.{name}": tensor for name, tensor in state.items()}
    result["lm_head.weight"] = state["embed_tokens.weight"]
    return result
