"""Page shares on a GPU: the largest share of mass that any row of a query block has in a page."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.page_scores import PageBlocks, PageMaxScores, Rows
from dam_vllm.attention.cuda.plan import MOVING, page_arguments, static_pages
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks
from dam_vllm.attention.cuda.score import LOWEST, lanes, query_block_of_rows
from dam_vllm.attention.cuda.scratch import Room
from dam_vllm.masks.page_tables import PageSelector

ELEMENTS = 4096
# Bits of 2.0, above those of any share of mass: what a static page has instead.
STATIC = tl.constexpr(0x40000000)


@dataclass(frozen=True)
class PageShares:
    """Shares of pages for query blocks, and what makes logits of rows shares of their mass.

    Attributes:
        largest: float32 [heads, slots, rows], largest logit of a row.
        total: float32 [heads, slots, rows], sum of exp(logit - largest) over a row's pages.
        bits: int32 [heads, slots, pages], the largest share over the query block's rows as the
            bits of a float32, which order as they do; `STATIC` for static pages; undefined after
            the query block's own page.
    """

    largest: torch.Tensor
    total: torch.Tensor
    bits: torch.Tensor


def share_pages(
    max_scores: PageMaxScores,
    query_blocks: DeviceQueryBlocks,
    static: PageSelector,
    rows: Rows,
    blocks: PageBlocks,
    room: Room,
) -> PageShares:
    """Tells shares of pages for all query blocks of one query, or for all longer ones.

    Args:
        max_scores: of these query blocks.
        query_blocks: of one page each.
        static: page tables of the heads, one layer.
        rows: which query blocks.
        blocks: how pages are cut.
        room: memory for the result.

    Returns:
        The shares; undefined for other query blocks.
    """
    n, slots, width, count = max_scores.logits.shape
    chunks = max_scores.sums.shape[2]
    largest, total = (room.take(torch.float32, n, slots, count) for _ in range(2))
    bits = room.take(torch.int32, n, slots, width)
    block = max(1, ELEMENTS // rows.block)
    sizes = {
        "HEADS_PER_KV": rows.heads_per_kv,
        "QUERIES": rows.queries,
        "ROWS": rows.block,
        "COUNT": count,
        "PAGE": blocks.page,
    }
    _sum_chunks[(slots * rows.blocks, n)](
        max_scores.largest, max_scores.sums, largest, total, *query_blocks.arguments, slots, chunks,
        CHUNK=blocks.chunk, CHUNKS=block, BLOCKS=rows.blocks, **sizes,
    )  # fmt: skip
    _share_pages[(slots, n, lanes(slots * n, triton.cdiv(width, block)))](
        max_scores.logits, largest, total, bits, *query_blocks.arguments, slots, width,
        **page_arguments(static), PAGES=block, **sizes,
    )  # fmt: skip
    return PageShares(largest, total, bits)


@triton.jit(do_not_specialize=["slots", "chunks"], do_not_specialize_on_alignment=MOVING)
def _sum_chunks(
    chunk_largest_ptr, chunk_sum_ptr, largest_ptr, total_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, HEADS_PER_KV: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Joins what the chunks of a block of rows hold."""
    slot = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    _, own, _, _, queries = query_block_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if block * ROWS >= queries * HEADS_PER_KV:
        return
    query_block = (tl.program_id(1) * slots + slot).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    present = row < queries * HEADS_PER_KV
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    count = own // CHUNK + 1
    for first in range(0, count, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        place = (query_block * chunks + chunk)[:, None] * COUNT + row[None, :]
        known = (chunk < count)[:, None] & present[None, :]
        maxima = tl.load(chunk_largest_ptr + place, mask=known, other=float("-inf"))
        sums = tl.load(chunk_sum_ptr + place, mask=known, other=0.0)
        larger = tl.maximum(largest, tl.max(maxima, axis=0))
        total *= tl.exp(largest - larger)
        total += tl.sum(sums * tl.exp(maxima - larger[None, :]), axis=0)
        largest = larger
    tl.store(largest_ptr + query_block * COUNT + row, largest, mask=present)
    tl.store(total_ptr + query_block * COUNT + row, total, mask=present)


@triton.jit
def mass_of_pages(
    query_block, page, wanted, width, rows, first_row,
    max_score_ptr, largest_ptr, total_ptr,
    ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Shares of mass that a block of a query block's rows has in pages, 0 where none is wanted.

    `query_block` is where the query block lies, `page` an int32 block, `wanted` an int1 block of
    those to tell about, `width` how many a query block has in memory. The query block has `rows`
    rows, COUNT in memory; the block has ROWS from `first_row` on. For the rest see `PageMaxScores`
    and `PageShares`. Gives a float32 block [pages, ROWS].
    """
    row = first_row + tl.arange(0, ROWS)
    present = row < rows
    largest = tl.load(largest_ptr + query_block * COUNT + row, mask=present, other=0.0)
    total = tl.load(total_ptr + query_block * COUNT + row, mask=present, other=1.0)
    logits = tl.load(
        max_score_ptr + (query_block * width + page)[:, None] * COUNT + row[None, :],
        mask=wanted[:, None] & present[None, :],
        other=float("-inf"),
    )
    return tl.exp(logits - largest[None, :]) / total[None, :]


@triton.jit(do_not_specialize=["slots", "width"], do_not_specialize_on_alignment=MOVING)
def _share_pages(
    max_score_ptr, largest_ptr, total_ptr, bits_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, width,
    near_ptr, columns_ptr, distances_ptr,
    near_blocks, near_pages, columns, distances, dense_blocks,
    PAGES: tl.constexpr, HEADS_PER_KV: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    COUNT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Tells the shares of some of a query block's pages."""
    slot = tl.program_id(0)
    at = tl.program_id(1)
    _, own, _, _, queries = query_block_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if queries == 0:
        return
    query_block = (at * slots + slot).to(tl.int64)
    for first in range(tl.program_id(2) * PAGES, own + 1, tl.num_programs(2) * PAGES):
        page = first + tl.arange(0, PAGES)
        best = tl.zeros([PAGES], tl.float32)
        for first_row in range(0, queries * HEADS_PER_KV, ROWS):
            mass = mass_of_pages(
                query_block, page, page <= own, width, queries * HEADS_PER_KV, first_row,
                max_score_ptr, largest_ptr, total_ptr, ROWS, COUNT,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(mass, axis=1))
        static = static_pages(
            page, at, own, own, near_ptr, columns_ptr, distances_ptr,
            near_blocks, near_pages, columns, distances, dense_blocks, 1,
        )  # fmt: skip
        bits = tl.where(static, STATIC, best.to(tl.int32, bitcast=True))
        tl.store(bits_ptr + query_block * width + page, bits, mask=page <= own)
