"""Random weights under which heads attend to some tokens more than to others.

vLLM's own dummy weights are so small, those of norms included, that every key scores the same:
heads that choose pages would find them all equal, and take them all.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from dam_vllm.bench.model import Model
from dam_vllm.options import OptionError

SEED = 2508


def write_weights(folder: Path, model: Model) -> None:
    """Writes weights in bfloat16, a file a layer: scores have a standard deviation of about 1.

    Args:
        folder: of the model's configuration.
        model: its shape.

    Raises:
        OptionError: if the disk is too full.
    """
    free = shutil.disk_usage(folder).free
    if free < model.weight_bytes:
        raise OptionError(
            f"heads that choose pages need weights: {model.weight_bytes / 1e9:.1f} GB in "
            f"{tempfile.gettempdir()} (TMPDIR), {free / 1e9:.1f} GB are free"
        )
    generator = torch.Generator().manual_seed(SEED)
    where: dict[str, str] = {}
    for part, shapes in _parts(model):
        file = f"model-{part}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": model.weight_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _parts(model: Model) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Shapes of a model's weights by name in transformers, what belongs to no layer first."""
    hidden, size, inner = model.hidden, model.head_size, model.intermediate
    queries, keys = model.heads * size, model.kv_heads * size
    outside = {
        "model.embed_tokens.weight": (model.vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not model.tied:
        outside["lm_head.weight"] = (model.vocabulary, hidden)
    yield "rest", outside
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if model.kind == "qwen3":
        layer |= {"self_attn.q_norm": (size,), "self_attn.k_norm": (size,)}
    for at in range(model.layers):
        yield str(at), {f"model.layers.{at}.{name}.weight": shape for name, shape in layer.items()}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Factors of a norm are 1; products keep the size of what they are given."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).bfloat16()
