"""Which heads and layers of the mask set this worker holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.models.utils import extract_layer_index

from dam_vllm.engine.checks import Serving
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import PageTables, page_tables


@dataclass(frozen=True)
class Shard:
    """The KV heads of one tensor-parallel rank, as global ids start..stop-1."""

    start: int
    stop: int

    def tables(
        self, masks: MaskSet, layer: int, page: int, query_block: int | None = None
    ) -> PageTables:
        """The layer's page tables, cut to this rank's KV heads."""
        return page_tables(masks, layer, page, query_block).take(slice(self.start, self.stop))

    def dynamic_heads(self, masks: MaskSet, layer: int) -> list[int]:
        """This rank's dynamic KV heads, as local ids."""
        modes = masks.modes[layer, self.start : self.stop]
        return [head for head, mode in enumerate(modes) if mode == HeadMode.DYNAMIC]


def shards(kv_heads: int, ranks: int) -> list[Shard]:
    """KV heads of every rank: even slices, or one head that several ranks share.

    Args:
        kv_heads: KV heads of the whole model.
        ranks: tensor-parallel ranks.

    Returns:
        The shards (vllm/model_executor/layers/linear.py, QKVParallelLinear).
    """
    if kv_heads >= ranks:
        each = kv_heads // ranks
        return [Shard(rank * each, (rank + 1) * each) for rank in range(ranks)]
    heads = [rank // (ranks // kv_heads) for rank in range(ranks)]
    return [Shard(head, head + 1) for head in heads]


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
    types = serving.masks.header.layer_types
    found = {name: extract_layer_index(name) for name in names}
    return {
        name: index
        for name, index in found.items()
        if index < len(types) and types[index] == "full" and not attention[name].impl.windowed
    }
