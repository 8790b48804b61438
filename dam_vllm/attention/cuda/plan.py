"""Where the queries of a step lie and which pages are static, as Triton kernels read it.

On a GPU nothing may wait for the host: how many query blocks a step has at most is known from its
query lengths, where they lie follows on the device from lengths that may change until the step
runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from dam_vllm.masks.page_tables import PageSelector


@dataclass(frozen=True)
class DeviceQueryBlocks:
    """Queries of some requests cut into query blocks, in as many slots as there can be.

    Attributes:
        request: int32 [slots], row of the batch.
        offset: int32 [slots], number of the query block among those of its request's queries.
        query_start_loc: int32 [requests + 1], first query row of each request.
        seq_lens: int32 [requests], tokens of each request up to its last query.
        query_block: tokens a query block.
        most_queries: most queries of a query block.
    """

    request: torch.Tensor
    offset: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    query_block: int
    most_queries: int

    def __len__(self) -> int:
        return len(self.request)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What `query_block_at` takes after the slot."""
        return self.request, self.offset, self.query_start_loc, self.seq_lens


def query_block_slots(queries: np.ndarray, query_block: int) -> np.ndarray:
    """Slots for the query blocks of requests whose queries may start anywhere in a query block.

    Args:
        queries: int [requests], queries of each.
        query_block: tokens a query block.

    Returns:
        int32 [2, slots], `DeviceQueryBlocks.request` and `DeviceQueryBlocks.offset`.
    """
    most = np.where(queries > 0, (queries + query_block - 2) // query_block + 1, 0)
    request = np.repeat(np.arange(len(queries)), most)
    offset = np.arange(len(request)) - np.repeat(most.cumsum() - most, most)
    return np.stack([request, offset]).astype(np.int32)


@triton.jit
def query_block_at(
    slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, QUERY_BLOCK: tl.constexpr
):
    """A slot's query block.

    Returns:
        Row of the batch, absolute query block index, first query row, position of the first query,
        and after the last one; as many queries as these are apart, none where they cross.
    """
    request = tl.load(request_ptr + slot)
    index = tl.load(offset_ptr + slot)
    row = tl.load(query_start_ptr + request)
    queries = tl.load(query_start_ptr + request + 1) - row
    end = tl.load(seq_len_ptr + request)
    first = end - queries
    index += first // QUERY_BLOCK
    start = tl.maximum(index * QUERY_BLOCK, first)
    stop = tl.minimum(index * QUERY_BLOCK + QUERY_BLOCK, end)
    return request, index, row + tl.minimum(start - first, queries), start, stop


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


@dataclass(frozen=True)
class DevicePlan:
    """Virtual sequences of a part of a batch: one for each slot and KV head.

    Attributes:
        table: int32 [slots, kv_heads, width], virtual pages; what lies after a sequence's end is
            not set.
        pages: int32 [slots, kv_heads, width], the same pages by their number in the request, or
            None where nobody asks.
        seq_lens: int32 [slots, kv_heads], virtual lengths in tokens, 0 for empty slots; strided.
        starts: int32 [slots + 1], first query row of each slot.
    """

    table: torch.Tensor
    pages: torch.Tensor | None
    seq_lens: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def empty(
        cls, query_blocks: DeviceQueryBlocks, kv_heads: int, width: int, numbered: bool = False
    ) -> "DevicePlan":
        """Room for a plan.

        Args:
            query_blocks: the part's queries.
            kv_heads: KV heads of the layer.
            width: most pages of a request.
            numbered: whether `pages` is wanted.
        """
        slots, new = len(query_blocks), query_blocks.request.new_empty
        table = new(slots, kv_heads, width)
        return cls(
            table=table,
            pages=torch.empty_like(table) if numbered else None,
            # Each head's lengths lie together, as FlashAttention wants them in prefill.
            seq_lens=new(kv_heads, slots).t(),
            starts=new(slots + 1),
        )


def plan_heads(
    plan: DevicePlan,
    heads: torch.Tensor,
    selector: PageSelector,
    query_blocks: DeviceQueryBlocks,
    block_table: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> None:
    """Fills in some heads of a plan, and its starts.

    Args:
        plan: written.
        heads: int32 [n], KV heads.
        selector: their page tables, of one layer.
        query_blocks: the part's queries, cut by the selector's query block.
        block_table: int32 [requests, at least the plan's width], vLLM's.
        chosen: bool [n, slots, width], pages beyond the selector's, or None.
    """
    slots, kv_heads, width = plan.table.shape
    _plan_kernel[(slots, len(heads))](
        plan.table,
        plan.pages,
        plan.seq_lens,
        plan.starts,
        heads,
        block_table,
        None if chosen is None else chosen.view(torch.uint8),
        *query_blocks.arguments,
        **page_arguments(selector),
        block_stride=block_table.stride(0),
        len_slot=plan.seq_lens.stride(0),
        len_head=plan.seq_lens.stride(1),
        slots=slots,
        kv_heads=kv_heads,
        width=width,
        QUERY_BLOCK=query_blocks.query_block,
        PAGE=selector.page,
        OWN=selector.own,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
    )


# What changes from step to step must not make a kernel be compiled anew.
@triton.jit(do_not_specialize=["len_slot", "len_head", "slots", "width"])
def _plan_kernel(
    table_ptr, page_ptr, seq_len_ptr, start_ptr, head_ptr, block_ptr, chosen_ptr,
    request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    near_ptr, columns_ptr, distances_ptr,
    near_blocks, near_pages, columns, distances, dense_blocks,
    block_stride, len_slot, len_head, slots, kv_heads, width,
    QUERY_BLOCK: tl.constexpr, PAGE: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot and one head: walks the pages up to the last, keeps those that are read."""
    slot, at = tl.program_id(0), tl.program_id(1)
    head = tl.load(head_ptr + at)
    request, index, row, start, stop = query_block_at(
        slot, request_ptr, offset_ptr, query_start_ptr, request_len_ptr, QUERY_BLOCK
    )
    last_page = tl.where(start < stop, (stop - 1) // PAGE, -1)
    line = (slot * kv_heads + head).to(tl.int64) * width
    count = 0
    for first in range(0, last_page + 1, BLOCK):
        page = first + tl.arange(0, BLOCK)
        read = static_pages(
            page, at, index, last_page, near_ptr, columns_ptr, distances_ptr,
            near_blocks, near_pages, columns, distances, dense_blocks, OWN,
        )  # fmt: skip
        if chosen_ptr is not None:
            bits = chosen_ptr + (at * slots + slot).to(tl.int64) * width + page
            read |= tl.load(bits, mask=page <= last_page, other=0) > 0
        place = line + count + tl.cumsum(read.to(tl.int32), 0) - 1
        block = tl.load(block_ptr + request.to(tl.int64) * block_stride + page, mask=read, other=0)
        tl.store(table_ptr + place, block * kv_heads + head, mask=read)
        if page_ptr is not None:
            tl.store(page_ptr + place, page, mask=read)
        count += tl.sum(read.to(tl.int32), 0)
    length = tl.where(count > 0, (count - 1) * PAGE + stop - last_page * PAGE, 0)
    tl.store(seq_len_ptr + slot * len_slot + head * len_head, length)
    if at == 0:
        tl.store(start_ptr + slot, row)
        if slot == slots - 1:
            tl.store(start_ptr + slots, row + tl.maximum(stop - start, 0))
