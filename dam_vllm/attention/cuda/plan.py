"""Which pages the query blocks of a step read, as Triton kernels tell each other."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.counts import Tally
from dam_vllm.attention.cuda.places import Places
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_at
from dam_vllm.masks.page_tables import PageSelector


def page_arguments(selector: PageSelector) -> dict[str, Any]:
    """What `static_pages` takes of a selector of one layer, by name of its parameters."""
    near, columns, distances = (
        bits[0].view(torch.uint8) for bits in (selector.near, selector.columns, selector.distances)
    )
    return {
        "near_ptr": near,
        "columns_ptr": columns,
        "distances_ptr": distances,
        "near_blocks": near.shape[1],
        "near_pages": near.shape[2],
        "columns": columns.shape[1],
        "distances": distances.shape[1],
        "dense_blocks": selector.dense_blocks,
    }


@triton.jit
def static_pages(
    page, head, index, last_page,
    near_ptr, columns_ptr, distances_ptr,
    near_blocks, near_pages, columns, distances, dense_blocks,
    OWN: tl.constexpr,
):  # fmt: skip
    """Which pages a head reads for a query block, as `PageSelector.select` tells it.

    `page` is an int32 block, `head` a row of the tables, `index` the absolute query block index;
    no page after `last_page`, the query block's own last one, is read. A query block has OWN
    pages; for the rest see `page_arguments`. Gives an int1 block.
    """
    distance = index * OWN - page
    reach = tl.minimum(tl.maximum(distance, 0), distances - 1)
    far = tl.load(distances_ptr + head * distances + reach) > 0
    column = tl.load(columns_ptr + head * columns + page, mask=page < columns, other=0) > 0
    is_near = page < tl.where(index < near_blocks, near_pages, 0)
    near = tl.load(
        near_ptr + (head * near_blocks + index) * near_pages + page, mask=is_near, other=0
    )
    read = tl.where(is_near, near > 0, far | column)
    read |= page >= tl.where(
        index < dense_blocks, 0, last_page
    )  # the last page is the query block's own
    return read & (page <= last_page)


BLOCK = 1024
# Where vLLM's tensors are cut differs from step to step; no kernel may be compiled anew for it.
MOVING = [
    "request_ptr", "offset_ptr", "query_start_ptr", "request_len_ptr", "seq_len_ptr", "start_ptr",
    "table_ptr", "page_ptr", "head_ptr", "group_ptr", "place_ptr", "block_ptr", "chosen_ptr",
    "row_ptr", "count_ptr", "cell_ptr",
]  # fmt: skip


@dataclass(frozen=True)
class DevicePlan:
    """Virtual sequences of a part of a batch: one for each slot and KV head.

    Attributes:
        table: int32 [sequences, width], virtual pages; what lies after a sequence's end is not set.
        pages: int32 [sequences, width], the same pages by their number in the request, or None
            where nobody asks.
        seq_lens: int32 [sequences], virtual lengths in tokens, 0 for empty slots.
        starts: int32 [sequences + 1] where each head's slots follow each other, first query row of
            each sequence when rows are counted head by head; None otherwise.
        places: of the heads that are planned.
    """

    table: torch.Tensor
    pages: torch.Tensor | None
    seq_lens: torch.Tensor
    starts: torch.Tensor | None
    places: Places

    @classmethod
    def empty(
        cls, query_blocks: DeviceQueryBlocks, places: Places, width: int, numbered: bool = False
    ) -> "DevicePlan":
        """Room for a plan of one set of heads, or of all heads of a layer slot by slot.

        Args:
            query_blocks: the part's queries.
            places: of the heads.
            width: most pages of a request.
            numbered: whether `pages` is wanted.
        """
        sequences = len(query_blocks) * places.numbers.shape[1]
        new = query_blocks.request.new_empty
        table = new(sequences, width)
        pages = torch.empty_like(table) if numbered else None
        starts = new(sequences + 1) if places.step == 1 else None
        return cls(table, pages, new(sequences), starts, places)

    def take(self, heads: slice) -> "DevicePlan":
        """The same plan, told of some of its heads."""
        return replace(self, places=replace(self.places, numbers=self.places.numbers[:, heads]))


def plan_heads(
    plan: DevicePlan,
    heads: torch.Tensor,
    selector: PageSelector,
    query_blocks: DeviceQueryBlocks,
    block_table: torch.Tensor,
    rows: int,
    kv_heads: int,
    chosen: tuple[torch.Tensor, torch.Tensor] | None = None,
    groups: torch.Tensor | None = None,
    tally: Tally | None = None,
) -> None:
    """Fills in a plan: one launch.

    Args:
        plan: written.
        heads: int32 [n], of KV heads in the order of the plan's places their parts of block 0, as
            virtual pages.
        selector: their page tables, as heads of one layer.
        query_blocks: the part's queries, cut by the selector's query block.
        block_table: int32 [requests, at least the plan's width], vLLM's; where there are groups
            [groups, requests, ...].
        rows: query rows of the part.
        kv_heads: virtual pages a block.
        chosen: pages beyond the selector's, or None: uint8 [rows, slots, width], 1 where one is
            read, and int32 [n], the row of each head.
        groups: int32 [n], the block table of each head, or None where there is one for all.
        tally: where the heads are counted, or None.
    """
    decodes = query_blocks.most_queries == 1
    counts, cells, dense = tally.arguments(decodes) if tally else (None, None, 0)
    _plan_kernel[(len(query_blocks), len(heads))](
        plan.table,
        plan.pages,
        plan.seq_lens,
        plan.starts,
        heads,
        groups,
        plan.places.numbers,
        block_table,
        *(chosen or (None, None)),
        counts,
        cells,
        *query_blocks.arguments,
        **page_arguments(selector),
        number_stride=plan.places.numbers.stride(0),
        group_stride=block_table.stride(0),
        block_stride=block_table.stride(-2),
        chosen_stride=0 if chosen is None else chosen[0].stride(0),
        count_stride=dense,
        slots=len(query_blocks),
        step=plan.places.step,
        rows=rows,
        kv_heads=kv_heads,
        width=plan.table.shape[1],
        QUERY_BLOCK=query_blocks.query_block,
        PAGE=selector.page,
        OWN=selector.own,
        BLOCK=BLOCK,
    )


@triton.jit
def sequence_at(slot, at, place_ptr, number_stride, slots, step):
    """The sequence of a slot and a head, see `Places`."""
    first = tl.load(place_ptr + at)
    add = tl.load(place_ptr + number_stride + at)
    return first * slots + slot * step + add


# What changes from step to step must not make a kernel be compiled anew.
@triton.jit(
    do_not_specialize=[
        "number_stride",
        "group_stride",
        "block_stride",
        "chosen_stride",
        "count_stride",
        "slots",
        "step",
        "rows",
        "width",
    ],
    do_not_specialize_on_alignment=MOVING,
)
def _plan_kernel(
    table_ptr, page_ptr, seq_len_ptr, start_ptr, head_ptr, group_ptr, place_ptr, block_ptr,
    chosen_ptr, row_ptr, count_ptr, cell_ptr,
    request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    near_ptr, columns_ptr, distances_ptr,
    near_blocks, near_pages, columns, distances, dense_blocks,
    number_stride, group_stride, block_stride, chosen_stride, count_stride,
    slots, step, rows, kv_heads, width,
    QUERY_BLOCK: tl.constexpr, PAGE: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot and one head: walks the pages up to the last, keeps those that are read."""
    slot, at = tl.program_id(0), tl.program_id(1)
    head = tl.load(head_ptr + at)
    request, index, row, start, stop = query_block_at(
        slot, request_ptr, offset_ptr, query_start_ptr, request_len_ptr, QUERY_BLOCK
    )
    last_page = tl.where(start < stop, (stop - 1) // PAGE, -1)
    sequence = sequence_at(slot, at, place_ptr, number_stride, slots, step)
    line = sequence.to(tl.int64) * width
    block_ptr += request.to(tl.int64) * block_stride
    if group_ptr is not None:
        block_ptr += tl.load(group_ptr + at).to(tl.int64) * group_stride
    count = 0
    for first in range(0, last_page + 1, BLOCK):
        page = first + tl.arange(0, BLOCK)
        read = static_pages(
            page, at, index, last_page, near_ptr, columns_ptr, distances_ptr,
            near_blocks, near_pages, columns, distances, dense_blocks, OWN,
        )  # fmt: skip
        if chosen_ptr is not None:
            chosen_row = tl.load(row_ptr + at).to(tl.int64) * chosen_stride
            bits = chosen_ptr + chosen_row + slot.to(tl.int64) * width + page
            read |= tl.load(bits, mask=page <= last_page, other=0) > 0
        place = line + count + tl.cumsum(read.to(tl.int32), 0) - 1
        block = tl.load(block_ptr + page, mask=read, other=0)
        tl.store(table_ptr + place, block * kv_heads + head, mask=read)
        if page_ptr is not None:
            tl.store(page_ptr + place, page, mask=read)
        count += tl.sum(read.to(tl.int32), 0)
    length = tl.where(count > 0, (count - 1) * PAGE + stop - last_page * PAGE, 0)
    tl.store(seq_len_ptr + sequence, length)
    if count_ptr is not None:
        cell = count_ptr + tl.load(cell_ptr + at)
        queries = tl.maximum(stop - start, 0).to(tl.int64)
        tl.atomic_add(cell, count * queries, sem="relaxed")
        tl.atomic_add(cell + count_stride, (last_page + 1) * queries, sem="relaxed")
    if start_ptr is not None:
        number = tl.load(place_ptr + 2 * number_stride + at)
        # Each set has an entry more than sequences: where its last one ends.
        entry = start_ptr + sequence + tl.load(place_ptr + 3 * number_stride + at)
        tl.store(entry, number * rows + row)
        if slot == slots - 1:
            tl.store(entry + 1, number * rows + row + tl.maximum(stop - start, 0))
