"""Models of random weights in public shapes, for servers under measurement."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dam_vllm.demo import model_dir

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 2304  # of the demo model, whose tokenizer all of them have
BF16_BYTES = 2


def _llama3(factor: float) -> dict[str, object]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _plain(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


@dataclass(frozen=True)
class Model:
    """Shape of a decoder.

    Attributes:
        layers: how many.
        hidden: channels between layers.
        intermediate: channels within the MLP.
        heads: query heads.
        kv_heads: KV heads.
        head_size: channels a head.
        vocabulary: rows of the embedding.
        tied: whether the output shares the embedding's weights.
        positions: longest request that the public configuration names, in tokens.
        rope: rotary embedding, as `rope_parameters` of the configuration.
        norm_eps: of RMS norms.
        kind: `model_type` of the configuration; "qwen3" norms queries and keys.
        architecture: class that vLLM serves it by.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int = VOCABULARY
    tied: bool = True
    positions: int = 0
    rope: Mapping[str, object] = field(default_factory=lambda: _plain(1e7))
    norm_eps: float = 1e-5
    kind: str = "llama"
    architecture: str = "LlamaForCausalLM"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        norms = 2 * self.hidden + (2 * self.head_size if self.kind == "qwen3" else 0)
        layer = attention + 3 * self.hidden * self.intermediate + norms
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return BF16_BYTES * (self.layers * layer + embeddings + self.hidden)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers, in bfloat16."""
        return 2 * BF16_BYTES * self.layers * self.kv_heads * self.head_size

    def describe(self) -> str:
        """One line for a table's title."""
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads, "
            f"{self.kv_heads} KV heads of {self.head_size}, random weights"
        )


# Many narrow heads on a thin residual stream: at 16k tokens attention takes most of the time,
# as in models of everyday size with longer prompts than two cores can compute.
LONG = Model(layers=4, hidden=512, intermediate=1024, heads=32, kv_heads=8, head_size=64)
DEMO = Model(layers=4, hidden=192, intermediate=384, heads=8, kv_heads=4, head_size=32)

MODELS = {
    "long": LONG,
    "llama-3.2-1b": Model(
        layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_size=64,
        vocabulary=128256, positions=131072, rope=_llama3(32.0),
    ),
    "llama-3.1-8b": Model(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_size=128,
        vocabulary=128256, tied=False, positions=131072, rope=_llama3(8.0),
    ),
    "qwen3-4b": Model(
        layers=36, hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_size=128,
        vocabulary=151936, positions=40960, rope=_plain(1e6), norm_eps=1e-6,
        kind="qwen3", architecture="Qwen3ForCausalLM",
    ),
    "qwen3-8b": Model(
        layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_size=128,
        vocabulary=151936, tied=False, positions=40960, rope=_plain(1e6), norm_eps=1e-6,
        kind="qwen3", architecture="Qwen3ForCausalLM",
    ),
}  # fmt: skip


def write_model(folder: Path, model: Model, length: int) -> Path:
    """Writes configuration and tokenizer, no weights: serve with `--load-format dummy`.

    Args:
        folder: where to; made if need be.
        model: its shape.
        length: longest request in tokens; may be beyond what the public configuration names.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copy(model_dir() / name, folder)
    config = json.loads((model_dir() / "config.json").read_text())
    config |= {
        "architectures": [model.architecture],
        "model_type": model.kind,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": dict(model.rope),
        "max_position_embeddings": max(length, model.positions),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
