"""Which heads and layers of the mask set this worker holds."""

from dataclasses import dataclass

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.pages import PageTables, page_tables


@dataclass(frozen=True)
class Shard:
    """The KV heads of one tensor-parallel rank, as global ids start..stop-1."""

    start: int
    stop: int

    def tables(self, masks: MaskSet, layer: int, page: int, tile: int | None = None) -> PageTables:
        """The layer's page tables, cut to this rank's KV heads."""
        return page_tables(masks, layer, page, tile).take(slice(self.start, self.stop))

    def dynamic_heads(self, masks: MaskSet, layer: int) -> list[int]:
        """This rank's dynamic KV heads, as local ids."""
        modes = masks.modes[layer, self.start : self.stop]
        return [head for head, mode in enumerate(modes) if mode == HeadMode.DYNAMIC]


def shard(kv_heads: int) -> Shard:
    """KV heads of this rank: an even slice, or one head that several ranks share.

    Args:
        kv_heads: KV heads of the whole model.

    Returns:
        The shard (vllm/model_executor/layers/linear.py, QKVParallelLinear).
    """
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    if kv_heads >= size:
        each = kv_heads // size
        return Shard(rank * each, (rank + 1) * each)
    head = rank // (size // kv_heads)
    return Shard(head, head + 1)
