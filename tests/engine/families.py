"""Small random models of the families that are served, and of kinds that are not."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)

from tests.unit.calibration.conftest import save_tokenizer

HEAD_SIZE = 32
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MHA = TOKENS | {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}  # fmt: skip
GQA = MHA | {"num_key_value_heads": 2}
HEAD = GQA | {"hidden_size": 64, "head_dim": HEAD_SIZE}
GEMMA = HEAD | {"num_hidden_layers": 4, "sliding_window": 64, "query_pre_attn_scalar": HEAD_SIZE}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# A state that is no larger than 32 tokens' keys and values: vLLM makes pages as large as a state.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
BIG_CODE = {"n_positions": 1024, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 96}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}

SERVED = {
    "Llama": lambda: LlamaConfig(**HEAD),
    "Mistral": lambda: MistralConfig(**HEAD, sliding_window=None),
    "Qwen 2": lambda: Qwen2Config(**GQA),
    "Qwen 3": lambda: Qwen3Config(**HEAD),
    "Qwen 3 MoE": lambda: Qwen3MoeConfig(**HEAD, **MOE),
    "Phi 3": lambda: Phi3Config(**GQA, sliding_window=None),
    "Gemma 2": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=5.0),
    "Gemma 3": lambda: Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "OLMo 2": lambda: Olmo2Config(**GQA),
    "Granite": lambda: GraniteConfig(**GQA, attention_multiplier=0.125),
    "Granite 4, hybrid": lambda: GraniteMoeHybridConfig(
        **MHA, **MAMBA, num_key_value_heads=4, attention_multiplier=0.125, num_local_experts=0,
        shared_intermediate_size=96, layer_types=["mamba", "attention"],
    ),
    "GPT-NeoX": lambda: GPTNeoXConfig(**MHA),
    "GPTBigCode": lambda: GPTBigCodeConfig(**TOKENS, **BIG_CODE, multi_query=True),
}  # fmt: skip
REFUSED = {
    "attention sinks (learned per head)": lambda: GptOssConfig(
        **HEAD, num_local_experts=4, num_experts_per_tok=2, architectures=["GptOssForCausalLM"]
    ),
    "multi-head latent attention (MLA)": lambda: DeepseekV2Config(
        **MHA, **LATENT, q_lora_rank=None, n_routed_experts=2, num_experts_per_tok=1,
        first_k_dense_replace=1, architectures=["DeepseekV2ForCausalLM"],
    ),
    "ALiBi": lambda: BloomConfig(
        vocab_size=64, hidden_size=64, n_layer=1, n_head=2, architectures=["BloomForCausalLM"]
    ),
    "no attention layers": lambda: MambaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, architectures=["MambaForCausalLM"]
    ),
}  # fmt: skip


def windowed():
    """A Mistral all of whose layers have a sliding window."""
    return MistralConfig(**HEAD, sliding_window=64)


def write(config, folder):
    """Saves a model whose attention is far from uniform, and a tokenizer of 64 words."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
