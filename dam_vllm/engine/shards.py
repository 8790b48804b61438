"""Which heads and layers of the mask set this worker holds."""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.models.utils import extract_layer_index

from dam_vllm.engine.serving import Serving
from dam_vllm.masks.sharding import Shard, shards


def shard(kv_heads: int) -> Shard:
    """KV heads of this rank, of `kv_heads` of the whole model."""
    ranks = shards(kv_heads, get_tensor_model_parallel_world_size())
    return ranks[get_tensor_model_parallel_rank()]


def masked_layers(
    names: Iterable[str], attention: Mapping[str, Any], serving: Serving
) -> dict[str, int]:
    """Layers that the masks hold; the rest is vLLM's.

    Args:
        names: layers to look at.
        attention: vLLM's attention layers by name.
        serving: what is served.

    Returns:
        Global indices by name.
    """
    full = full_layers(names, serving).items()
    return {name: index for name, index in full if not attention[name].impl.windowed}


def full_layers(names: Iterable[str], serving: Serving) -> dict[str, int]:
    """Layers of full attention as the mask file has it; arguments and result as above."""
    types = serving.masks.header.layer_types
    found = {name: extract_layer_index(name) for name in names}
    return {
        name: index
        for name, index in found.items()
        if index < len(types) and types[index] == "full"
    }
