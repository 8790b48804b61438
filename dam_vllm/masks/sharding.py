"""Which KV heads of the mask set each tensor-parallel rank holds."""

from dataclasses import dataclass

from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import PageTables, page_tables


@dataclass(frozen=True)
class Shard:
    """The KV heads of one tensor-parallel rank, as global ids start..stop-1.

    Attributes:
        start: the first KV head.
        stop: after the last one.
        part: which of the ranks that share its KV head it is.
        parts: how many ranks share it.
    """

    start: int
    stop: int
    part: int = 0
    parts: int = 1

    @property
    def heads(self) -> int:
        """How many KV heads the rank holds."""
        return self.stop - self.start

    def query_heads(self, masks: MaskSet) -> slice:
        """The rank's query heads, as global ids."""
        each = masks.heads // masks.kv_heads // self.parts
        first = (self.start * self.parts + self.part) * each
        return slice(first, first + self.heads * each)

    def tables(
        self, masks: MaskSet, layer: int, page: int, query_block: int | None = None
    ) -> PageTables:
        """The layer's page tables, cut to this rank's KV heads.

        What any query head of a KV head sees is read, also where another rank holds that query
        head: ranks that share a KV head read, and free, the same static pages.
        """
        return page_tables(masks, layer, page, query_block).take(slice(self.start, self.stop))

    def dynamic_heads(self, masks: MaskSet, layer: int) -> list[int]:
        """This rank's dynamic KV heads, as local ids."""
        return self._heads(masks, layer, HeadMode.DYNAMIC)

    def reusing_heads(self, masks: MaskSet, layer: int) -> list[int]:
        """This rank's reusing KV heads, as local ids."""
        return self._heads(masks, layer, HeadMode.REUSE)

    def tails(self, masks: MaskSet, layer: int) -> list[int]:
        """This rank's KV heads with a tail, as local ids."""
        if masks.tails is None:
            return []
        return masks.tails[layer, self.start : self.stop].nonzero()[0].tolist()

    def anchor(self, masks: MaskSet, layer: int, head: int) -> tuple[int, int]:
        """Layer and local id of a reusing head's anchor, which this rank holds too."""
        of_layer, of_head = masks.anchor(layer, self.start + head)
        return of_layer, of_head - self.start

    def holds(self, head: int) -> bool:
        """Whether the rank holds a KV head, told by its global id."""
        return self.start <= head < self.stop

    def _heads(self, masks: MaskSet, layer: int, wanted: HeadMode) -> list[int]:
        modes = masks.modes[layer, self.start : self.stop]
        return [head for head, mode in enumerate(modes) if mode == wanted]


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
    parts = ranks // kv_heads
    return [Shard(rank // parts, rank // parts + 1, rank % parts, parts) for rank in range(ranks)]
