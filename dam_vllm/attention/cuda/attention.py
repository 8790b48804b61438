"""Sparse attention on CUDA: a step's plan tells where queries lie, what they read is planned there.

The host knows how many queries a step has, not what the lengths on the device will be when a CUDA
graph is replayed: what depends on them follows in kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dam_vllm.attention.cuda.bundle import Bundle, Part, PlanMemory
from dam_vllm.attention.cuda.counts import DeviceCounts
from dam_vllm.attention.cuda.layer import DeviceLayer, HeadSet, LayerRun, Paged, layer_runs
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_slots
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.cuda.tuning import processors
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.span_means import SpanMeans
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import dense_until, query_block_size
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard


@dataclass(frozen=True)
class Limits:
    """The largest step.

    Attributes:
        requests: of a step.
        tokens: of a step.
        length: tokens of a request.
    """

    requests: int
    tokens: int
    length: int


@dataclass(frozen=True)
class CUDAAttention:
    """Sparse attention of layers that share a block table.

    Attributes:
        served: layers by name, in the order in which they run.
        page: tokens a page.
        layout: of the cache.
        limits: of steps.
        scratch: memory for plans, queries and outputs.
        dense_below: positions below it read everything.
        counts: counts what is read, or None.
        device: where queries are.
        unit: KV heads a cache group holds of a block, where a layer's lie in several groups (`tell`
            says where, steps have block tables [groups, requests, n]); else None.
    """

    served: Mapping[str, DeviceLayer]
    page: int
    layout: KVLayout
    limits: Limits
    scratch: Scratch
    dense_below: int
    counts: DeviceCounts | None
    device: torch.device
    unit: int | None = None
    _sizes: Sequence[int] = field(init=False)
    _first: torch.Tensor = field(init=False)
    _each: torch.Tensor = field(init=False)
    _runs: Mapping[str, LayerRun] = field(init=False)
    _means: SpanMeans = field(init=False, default_factory=SpanMeans)

    def __post_init__(self) -> None:
        sizes = {query_block_size(self.page)}
        if any(layer.choosing is not None for layer in self.served.values()):
            sizes.add(self.page)
        kv_heads = max(layer.kv_heads for layer in self.served.values())
        # Kept, since a CUDA graph reads them where they lie.
        zeros = torch.zeros(self.limits.requests, dtype=torch.int32, device=self.device)
        each = torch.arange(self.limits.requests * kv_heads + 1).to(zeros)
        object.__setattr__(self, "_sizes", sorted(sizes))
        object.__setattr__(self, "_first", zeros)
        object.__setattr__(self, "_each", each)
        object.__setattr__(self, "_runs", self._bundle())

    @property
    def _indices(self) -> list[int]:
        return [layer.index for layer in self.served.values()]

    @property
    def layers(self) -> Mapping[str, DeviceLayer]:
        return self.served

    def plan(self, step: Step) -> tuple[Part, ...]:
        """Requests with one query, then those with more; vLLM puts them in this order."""
        if self.counts is not None and self.counts.layers[0] in self._indices:
            self.counts.begin_step()
        decodes, width = _decodes(step), self._width(step)
        parts = []
        if decodes:
            lens = (step.query_start_loc[: decodes + 1], step.seq_lens[:decodes])
            slots = (self._each[:decodes], self._first[:decodes])
            blocks = {size: DeviceQueryBlocks(*slots, *lens, size, 1) for size in self._sizes}
            table = step.block_table[..., :decodes, :]
            parts.append(Part(blocks, table, slice(0, decodes), width))
        if decodes < len(step.seq_lens):
            before = int(step.query_start_loc_cpu[decodes])
            lens = (step.query_start_loc[decodes:] - before, step.seq_lens[decodes:])
            queries = np.diff(step.query_start_loc_cpu.numpy()[decodes:])
            blocks = {}
            for size in self._sizes:
                request, offset = self._move(query_block_slots(queries, size))
                most = min(size, int(queries.max()))
                blocks[size] = DeviceQueryBlocks(request, offset, *lens, size, most)
            # A head's rows end where the next one's begin, so that padding must not count.
            rows = slice(before, int(step.query_start_loc_cpu[-1]))
            table = step.block_table[..., decodes:, :]
            parts.append(Part(blocks, table, rows, width, decodes))
        return tuple(parts)

    def tell(self, offset: torch.Tensor, group: torch.Tensor) -> None:
        """Tells where KV heads lie that are in several cache groups, before the first plan.

        Args:
            offset: int64 [layers, kv_heads], virtual pages of their parts of block 0.
            group: int64 [layers, kv_heads], which block table is theirs.
        """
        bundles: dict[int, tuple[Bundle, list[tuple[int, int]]]] = {}
        for row, run in enumerate(self._runs.values()):
            _, static = bundles.setdefault(id(run.bundle), (run.bundle, []))
            static += [(row, head) for each in run.layer.static for head in each.ids]
            if run.homes is not None and run.layer.choosing is not None:
                heads = run.layer.choosing.heads.long().cpu()
                run.homes.tell(offset[row, heads], group[row, heads])
            if run.tails is not None:
                ids = list(run.tails.ids)
                run.tails.homes.tell(offset[row, ids], group[row, ids])
        for bundle, static in bundles.values():
            if static:
                rows, heads = torch.tensor(static).unbind(1)
                bundle.homes.tell(offset[rows, heads], group[rows, heads])

    def run(
        self,
        plan: tuple[Part, ...],
        layer: str,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See `Runner.run`; layers run in their order, since the first of a bundle plans it."""
        run, (key, value) = self._runs[layer], self.layout.keys_and_values(cache)
        if run.tails is not None:
            # A part may read spans that another one ends, by pages that requests share.
            for part in plan:
                run.tails.write(key, value, output.dtype, part)
        for part in plan:
            run.attend(Paged(query[part.rows], key, value, output[part.rows]), part)

    def warm_up(self, heads: int, size: int, dtypes: Sequence[torch.dtype]) -> None:
        """Runs steps of every kind, so that all kernels are compiled that serving launches.

        Args:
            heads: query heads.
            size: channels a head.
            dtypes: of queries, of the cache and of outputs.
        """
        kv_heads = next(iter(self.served.values())).kv_heads
        cache = torch.zeros(1, kv_heads, self.page, 2 * size, device=self.device).to(dtypes[1])
        longest = min(self.limits.length, self.limits.tokens, 2 * query_block_size(self.page))
        # The keys of a long request are split; those of a short one, or of so many, are not.
        many = min(self.limits.requests, 4 * processors(self.device))
        most = self.limits.length
        for queries, length in (([1], most), ([1], 1), ([1] * many, most), ([1, longest], most)):
            new = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
            lens = torch.tensor(queries, dtype=torch.int32)
            shape: tuple[int, ...] = (len(queries), ceil_div(self.limits.length, self.page))
            if self.unit is not None:
                shape = (1, *shape)
            step = Step(
                query_start_loc=new.to(self.device),
                query_start_loc_cpu=new,
                seq_lens=lens.to(self.device),
                block_table=torch.zeros(shape, dtype=torch.int32, device=self.device),
                tokens=int(new[-1]),
                max_query_len=max(queries),
                max_seq_len=length,
            )
            query = torch.zeros(step.tokens, heads, size, device=self.device).to(dtypes[0])
            planned = self.plan(step)
            for name in self.served:
                output = torch.empty_like(query, dtype=dtypes[2])
                self.run(planned, name, query, cache, output)
        self._means.clear()
        if self.counts is not None:
            self.counts.clear()

    def count_dense(self, step: Step) -> None:
        """Counts what a step reads all of whose queries read everything."""
        if self.counts is not None and step.seq_lens_cpu is not None:
            starts, lens = step.query_start_loc_cpu, step.seq_lens_cpu
            self.counts.add_whole(self._indices, starts, lens, max(self._sizes), self.page)

    def _bundle(self) -> dict[str, LayerRun]:
        """Puts layers together as far as their plans fit into the memory for them."""
        self.scratch.begin(tuple(self.served))
        names, query_block = list(self.served), query_block_size(self.page)
        most = max(layer.kv_heads for layer in self.served.values())
        numbered = any(each.exact for layer in self.served.values() for each in layer.static)
        width = ceil_div(self.limits.length, self.page)
        requests = min(self.limits.requests, self.limits.tokens)
        # A request's queries may begin and end inside a query block.
        sequences = (self.limits.tokens // query_block + 2 * requests) * most
        # Of each sequence a line of each table, its length and its start.
        fitting = self.scratch.left() // (sequences * (width * (1 + numbered) + 2) + 64)
        count = min(max(1, fitting), len(names))
        sets = sum(len(layer.static) for layer in self.served.values())
        memory = PlanMemory.of(self.scratch, count * sequences, sets, width, numbered)
        runs: dict[str, LayerRun] = {}
        for first in range(0, len(names), count):
            own = names[first : first + count]
            layers = [self.served[name] for name in own]
            tables = [[(each.ids, each.tables) for each in layer.static] for layer in layers]
            heads = [
                (each.index, head) for each in layers for one in each.static for head in one.ids
            ]
            tally = None if self.counts is None else self.counts.tally(heads)
            bundle = Bundle.of(
                tables, most, query_block, self.dense_below, memory, self.unit, tally
            )
            made = layer_runs(
                layers, bundle, self.scratch, self._each, self.counts, self._means, self.unit
            )
            runs |= dict(zip(own, made, strict=True))
        return runs

    def _width(self, step: Step) -> int:
        return min(ceil_div(step.max_seq_len, self.page), step.block_table.shape[-1])

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


def static_sets(
    masks: MaskSet,
    index: int,
    shard: Shard,
    page: int,
    dense_below: int,
    exact: bool,
    device: torch.device,
) -> list[HeadSet]:
    """A layer's static KV heads, those together whose pages are selected alike.

    Args:
        masks: the mask set.
        index: global layer index.
        shard: KV heads of this rank.
        page: tokens a page.
        dense_below: positions below it read everything, up to static heads' query blocks.
        exact: whether static heads have token masks inside their pages.
        device: where to.

    Returns:
        Sets that hold every head once that is static or dense.
    """
    modes = masks.modes[index, shard.start : shard.stop]
    fixed = [head for head, mode in enumerate(modes) if mode in (HeadMode.STATIC, HeadMode.DENSE)]
    alike: list[tuple[list[int], TokenBits | None]] = [(fixed, None)]
    if exact:
        # A query is dense with its whole query block, whatever the masks' granularity.
        until = dense_until(dense_below, page)
        bits = TokenBits.of_layer(masks, index, shard.query_heads(masks), until, device)
        dense = [head for head in fixed if modes[head] == HeadMode.DENSE]
        alike = [([head for head in fixed if head not in dense], bits), (dense, None)]
    tables = shard.tables(masks, index, page)
    return [
        HeadSet(
            ids=tuple(ids),
            heads=torch.tensor(ids, dtype=torch.int32, device=device),
            tables=tables.take(ids),
            exact=bits,
        )
        for ids, bits in alike
        if ids
    ]
