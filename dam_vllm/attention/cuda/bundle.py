"""Static heads of several layers, planned by one launch into memory that is kept.

What a static head reads depends on positions alone, so that all layers of a step can be planned
before the first of them runs. Layers are bundled as far as their plans fit into a bounded memory;
a bundle is planned when its first layer runs, so that a CUDA graph captures that with the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from dam_vllm.attention.cuda.counts import Tally
from dam_vllm.attention.cuda.places import Homes, Places
from dam_vllm.attention.cuda.plan import DevicePlan, plan_heads
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.masks.page_tables import PageSelector, PageTables


@dataclass(frozen=True)
class Part:
    """Requests of a step that are served by the same launches; queries count from its first.

    Attributes:
        query_blocks: by query block size, its queries.
        block_table: int32 [requests, at least width], vLLM's; [groups, requests, ...] where KV
            heads lie in several cache groups.
        rows: query rows of the batch.
        width: most pages of a request.
        before: requests of the step that the part before this one serves.
    """

    query_blocks: Mapping[int, DeviceQueryBlocks]
    block_table: torch.Tensor
    rows: slice
    width: int
    before: int = 0

    @property
    def decodes(self) -> bool:
        """Whether every request has one query."""
        return all(query_blocks.most_queries == 1 for query_blocks in self.query_blocks.values())

    @property
    def tokens(self) -> int:
        """Query rows."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class PlanMemory:
    """Memory that bundles take turns with.

    Attributes:
        table: int32, flat.
        pages: int32, flat, or None where no page numbers are wanted.
        seq_lens: int32, flat.
        starts: int32, flat.
        width: most pages of a request, ever.
    """

    table: torch.Tensor
    pages: torch.Tensor | None
    seq_lens: torch.Tensor
    starts: torch.Tensor
    width: int

    @classmethod
    def of(
        cls, scratch: Scratch, sequences: int, sets: int, width: int, numbered: bool
    ) -> "PlanMemory":
        """Memory for so many sequences of heads in so many sets."""
        return cls(
            table=scratch.take(sequences * width),
            pages=scratch.take(sequences * width) if numbered else None,
            seq_lens=scratch.take(sequences),
            starts=scratch.take(sequences + sets),
            width=width,
        )

    def carve(self, first: int, sequences: int, width: int, places: Places) -> DevicePlan:
        """A plan of some sequences after others; starts are the only ones there are.

        Args:
            first: sequences before it.
            sequences: of the plan.
            width: of its tables.
            places: of its heads.
        """

        def cut(flat: torch.Tensor) -> torch.Tensor:
            start = first * self.width
            return flat[start : start + sequences * width].view(sequences, width)

        return DevicePlan(
            table=cut(self.table),
            pages=None if self.pages is None else cut(self.pages),
            seq_lens=self.seq_lens[first : first + sequences],
            starts=self.starts if places.step == 1 else None,
            places=places,
        )


@dataclass(frozen=True)
class Bundle:
    """Static heads of some layers.

    Attributes:
        sets: heads of each static set, layer by layer.
        kv_heads: KV heads of a layer.
        query_block: tokens a query block.
        homes: where the KV heads of all sets lie.
        selector: their page tables as heads of one layer, or None where no head is static.
        by_head: their places in prefill.
        by_slot: their places in decoding, beside those of dynamic heads.
        memory: where plans lie.
        tally: where the heads are counted, or None.
    """

    sets: Sequence[Sequence[int]]
    kv_heads: int
    query_block: int
    homes: Homes
    selector: PageSelector | None
    by_head: Places
    by_slot: Places
    memory: PlanMemory
    tally: Tally | None

    @classmethod
    def of(
        cls,
        layers: Sequence[Sequence[tuple[Sequence[int], PageTables]]],
        kv_heads: int,
        query_block: int,
        dense_below: int,
        memory: PlanMemory,
        unit: int | None = None,
        tally: Tally | None = None,
    ) -> "Bundle":
        """Bundles layers.

        Args:
            layers: KV heads and page tables of each static set of each layer.
            kv_heads: of a layer.
            query_block: tokens a query block.
            dense_below: positions below it read everything.
            memory: where plans lie.
            unit: KV heads a cache group holds of a block, where they lie in several; their homes
                are told later.
            tally: where the heads are counted, or None.
        """
        device = memory.table.device
        ids = [[head for heads, _ in sets for head in heads] for sets in layers]
        sizes = [[len(heads) for heads, _ in sets] for sets in layers]
        tables = [table for sets in layers for _, table in sets]
        heads = torch.tensor([*chain(*ids)], dtype=torch.int32, device=device)
        homes = Homes.of_heads(heads, kv_heads)
        return cls(
            sets=sizes,
            kv_heads=kv_heads,
            query_block=query_block,
            homes=homes if unit is None else Homes.unknown(len(heads), unit, device),
            selector=PageSelector([PageTables.joined(tables)], dense_below, device)
            if tables
            else None,
            by_head=Places.by_head([*chain(*sizes)], device),
            by_slot=Places.by_slot(ids, kv_heads, device),
            memory=memory,
            tally=tally,
        )

    def whole(self, part: Part) -> DevicePlan:
        """The plan of all layers for a part; memory alone, nothing is launched."""
        layers, slots = len(self.sets) * self.kv_heads, self._slots(part)
        if part.decodes:
            return self.memory.carve(0, layers * slots, part.width, self.by_slot)
        sequences = len(self.homes.offsets) * slots
        return self.memory.carve(layers * part.before, sequences, part.width, self.by_head)

    def fill(self, plan: DevicePlan, part: Part) -> None:
        """Plans all layers for a part: one launch."""
        if self.selector is not None:
            plan_heads(
                plan, self.homes.offsets, self.selector, part.query_blocks[self.query_block],
                part.block_table, part.tokens, self.homes.scale, groups=self.homes.groups,
                tally=self.tally,
            )  # fmt: skip

    def layer(self, plan: DevicePlan, number: int, part: Part) -> DevicePlan:
        """A layer's sequences in decoding, dynamic heads' included."""
        count = self._slots(part) * self.kv_heads
        return _cut(plan, number * count, count, 0)

    def heads_of(self, number: int, row: int) -> slice:
        """Where among all heads a set of a layer lies."""
        first = sum(map(sum, self.sets[:number])) + sum(self.sets[number][:row])
        return slice(first, first + self.sets[number][row])

    def set(self, plan: DevicePlan, number: int, row: int, part: Part) -> DevicePlan:
        """The sequences of a set of a layer in prefill; places stay those of all heads."""
        heads, slots = self.heads_of(number, row), self._slots(part)
        before = sum(map(len, self.sets[:number])) + row
        count = heads.stop - heads.start
        return _cut(plan, heads.start * slots, count * slots, before)

    def _slots(self, part: Part) -> int:
        return len(part.query_blocks[self.query_block])


def _cut(plan: DevicePlan, first: int, count: int, sets: int) -> DevicePlan:
    """Some sequences of a plan, after others in so many sets."""
    own = slice(first, first + count)
    return replace(
        plan,
        table=plan.table[own],
        pages=None if plan.pages is None else plan.pages[own],
        seq_lens=plan.seq_lens[own],
        starts=None if plan.starts is None else plan.starts[first + sets :][: count + 1],
    )
