"""Llama configurations with random weights, for servers under measurement."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from dam_vllm.demo import model_dir

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Llama:
    """Shape of a Llama model; the vocabulary is the demo model's.

    Attributes:
        layers: how many.
        hidden: channels between layers.
        heads: query heads.
        kv_heads: KV heads.
        head_size: channels a head.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int

    def describe(self) -> str:
        """One line for a table's title."""
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads, "
            f"{self.kv_heads} KV heads of {self.head_size}, random weights"
        )


# Many narrow heads on a thin residual stream: at 16k tokens attention takes most of the time,
# as in models of everyday size with longer prompts than two cores can compute.
LONG = Llama(layers=4, hidden=512, heads=32, kv_heads=8, head_size=64)
DEMO = Llama(layers=4, hidden=192, heads=8, kv_heads=4, head_size=32)


def write_model(folder: Path, shape: Llama, length: int) -> Path:
    """Writes configuration and tokenizer, no weights: serve with `--load-format dummy`.

    Args:
        folder: where to; made if need be.
        shape: of the model.
        length: longest request in tokens.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copy(model_dir() / name, folder)
    config = json.loads((model_dir() / "config.json").read_text())
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": length,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
