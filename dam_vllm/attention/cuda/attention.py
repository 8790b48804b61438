"""Sparse attention on CUDA: a step's plan tells where queries lie, each layer plans on the device.

The host knows how many queries a step has, not what the lengths on the device will be when a CUDA
graph is replayed: what depends on them follows in kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dam_vllm.attention.cuda.layer import DeviceLayer, HeadSet, Part
from dam_vllm.attention.cuda.plan import DeviceQueryBlocks, query_block_slots
from dam_vllm.attention.cuda.select import DeviceDynamic
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.page_counts import COUNTS
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import PageSelector, dense_until
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard


@dataclass(frozen=True)
class CUDAAttention:
    """Sparse attention of layers that share a block table.

    Attributes:
        served: layers by name.
        page: tokens a page.
        layout: of the cache.
        most_requests: requests of a step, at most.
        device: where queries are.
    """

    served: Mapping[str, DeviceLayer]
    page: int
    layout: KVLayout
    most_requests: int
    device: torch.device
    _sizes: Sequence[int] = field(init=False)
    _first: torch.Tensor = field(init=False)
    _each: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = {each.selector.query_block for layer in self.served.values() for each in layer.sets}
        zeros = torch.zeros(self.most_requests, dtype=torch.int32, device=self.device)
        object.__setattr__(self, "_sizes", sorted(sizes))
        object.__setattr__(self, "_first", zeros)
        # Kept, since a CUDA graph reads them where they lie.
        object.__setattr__(self, "_each", torch.arange(len(zeros)).to(zeros))

    @property
    def layers(self) -> Mapping[str, DeviceLayer]:
        return self.served

    def plan(self, step: Step) -> tuple[Part, ...]:
        """Requests with one query, then those with more; vLLM puts them in this order."""
        decodes, width = _decodes(step), self._width(step)
        parts = []
        if decodes:
            lens = (step.query_start_loc[: decodes + 1], step.seq_lens[:decodes])
            slots = (self._each[:decodes], self._first[:decodes])
            blocks = {size: DeviceQueryBlocks(*slots, *lens, size, 1) for size in self._sizes}
            parts.append(Part(blocks, step.block_table[:decodes], slice(0, decodes), width))
        if decodes < len(step.seq_lens):
            before = int(step.query_start_loc_cpu[decodes])
            lens = (step.query_start_loc[decodes:] - before, step.seq_lens[decodes:])
            queries = np.diff(step.query_start_loc_cpu.numpy()[decodes:])
            blocks = {}
            for size in self._sizes:
                request, offset = self._move(query_block_slots(queries, size))
                most = min(size, int(queries.max()))
                blocks[size] = DeviceQueryBlocks(request, offset, *lens, size, most)
            rows = slice(before, step.tokens)
            parts.append(Part(blocks, step.block_table[decodes:], rows, width))
        return tuple(parts)

    def run(
        self,
        plan: tuple[Part, ...],
        layer: str,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See `SparseAttention.run`."""
        key, value = self.layout.keys_and_values(cache)
        for part in plan:
            self.served[layer].attend(query, key, value, output, part)

    def count_dense(self, step: Step) -> None:
        """Counts what a step reads all of whose queries read everything; waits for the device."""
        if step.max_query_len > 1:
            heads = sum(layer.kv_heads for layer in self.served.values())
            lens = step.seq_lens.cpu()
            COUNTS.add_dense(step.query_start_loc_cpu, lens, max(self._sizes), self.page, heads)

    def _width(self, step: Step) -> int:
        return min(ceil_div(step.max_seq_len, self.page), step.block_table.shape[1])

    def _move(self, slots: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it."""
        host = torch.from_numpy(slots)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)


def _decodes(step: Step) -> int:
    """How many requests, the first ones, have at most one query."""
    longer = step.query_start_loc_cpu.diff() > 1
    if step.max_query_len <= 1 or not bool(longer.any()):
        return len(step.seq_lens)
    return int(longer.int().argmax())


def head_sets(
    masks: MaskSet,
    index: int,
    shard: Shard,
    page: int,
    dense_below: int,
    exact: bool,
    dynamic: DynamicHeads | None,
    device: torch.device,
) -> list[HeadSet]:
    """A layer's KV heads, those together whose pages are selected alike.

    Args:
        masks: the mask set.
        index: global layer index.
        shard: KV heads of this rank.
        page: tokens a page.
        dense_below: positions below it read everything, up to static heads' query blocks.
        exact: whether static heads have token masks inside their pages.
        dynamic: the layer's dynamic heads, or None.
        device: where to.

    Returns:
        Sets that hold every head once.
    """
    modes = masks.modes[index, shard.start : shard.stop]
    fixed = [head for head, mode in enumerate(modes) if mode != HeadMode.DYNAMIC]
    alike: list[tuple[list[int], TokenBits | None]] = [(fixed, None)]
    if exact:
        heads_per_kv = masks.heads // masks.kv_heads
        queries = slice(shard.start * heads_per_kv, shard.stop * heads_per_kv)
        # A query is dense with its whole query block, whatever the masks' granularity.
        until = dense_until(dense_below, page)
        bits = TokenBits.of_layer(masks, index, queries, until, device)
        dense = [head for head in fixed if modes[head] == HeadMode.DENSE]
        alike = [([head for head in fixed if head not in dense], bits), (dense, None)]
    tables = shard.tables(masks, index, page)
    sets = [
        HeadSet(
            ids=tuple(ids),
            heads=torch.tensor(ids, dtype=torch.int32, device=device),
            selector=PageSelector([tables.take(ids)], dense_below, device),
            exact=bits,
        )
        for ids, bits in alike
        if ids
    ]
    if dynamic is not None:
        chosen = DeviceDynamic.of(dynamic)
        sets.append(HeadSet(tuple(dynamic.ids), chosen.heads, chosen.static, chosen))
    return sets
