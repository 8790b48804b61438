"""Ranking of pages on a GPU: how much of its attention mass any row of a tile finds in a page."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.select import PageSelector
from dam_vllm.attention.triton_geometry import DeviceTiles, page_arguments, static_pages
from dam_vllm.attention.triton_score import LOWEST, PageBlocks, Peaks, Rows, lanes, tile_of_rows

ELEMENTS = 4096
# Bits of 2.0, above those of any share of mass: what a static page ranks as.
STATIC = tl.constexpr(0x40000000)


@dataclass(frozen=True)
class Ranking:
    """Ranks of pages for tiles, and what makes logits of rows shares of their mass.

    Attributes:
        largest: float32 [heads, slots, rows], largest logit of a row.
        total: float32 [heads, slots, rows], sum of exp(logit - largest) over a row's pages.
        bits: int32 [heads, slots, pages], the largest share over the tile's rows as the bits of
            a float32, which order as they do; `STATIC` for static pages; undefined after the
            tile's own page.
    """

    largest: torch.Tensor
    total: torch.Tensor
    bits: torch.Tensor


def rank_pages(
    peaks: Peaks, tiles: DeviceTiles, static: PageSelector, rows: Rows, blocks: PageBlocks
) -> Ranking:
    """Ranks pages for all tiles of one query, or for all longer ones.

    Args:
        peaks: of these tiles.
        tiles: of one page each.
        static: page tables of the heads, one layer.
        rows: which tiles.
        blocks: how pages are cut.

    Returns:
        The ranking; undefined for other tiles.
    """
    n, slots, width, count = peaks.logits.shape
    chunks = peaks.sums.shape[2]
    largest, total = peaks.sums.new_empty(2, n, slots, count)
    bits = torch.empty(n, slots, width, dtype=torch.int32, device=total.device)
    block = max(1, ELEMENTS // rows.block)
    sizes = {
        "GROUP": rows.group,
        "QUERIES": rows.queries,
        "ROWS": rows.block,
        "COUNT": count,
        "PAGE": blocks.page,
    }
    _sum_chunks[(slots * rows.blocks, n)](
        peaks.largest, peaks.sums, largest, total, *tiles.arguments, slots, chunks,
        CHUNK=blocks.chunk, CHUNKS=block, BLOCKS=rows.blocks, **sizes,
    )  # fmt: skip
    _rank_pages[(slots, n, lanes(slots * n, triton.cdiv(width, block)))](
        peaks.logits, largest, total, bits, *tiles.arguments, slots, width,
        **page_arguments(static), PAGES=block, **sizes,
    )  # fmt: skip
    return Ranking(largest, total, bits)


@triton.jit(do_not_specialize=["slots", "chunks"])
def _sum_chunks(
    chunk_largest_ptr, chunk_sum_ptr, largest_ptr, total_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Joins what the chunks of a block of rows hold."""
    slot = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    _, own, _, _, queries = tile_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if block * ROWS >= queries * GROUP:
        return
    tile = (tl.program_id(1) * slots + slot).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    present = row < queries * GROUP
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    count = own // CHUNK + 1
    for first in range(0, count, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        place = (tile * chunks + chunk)[:, None] * COUNT + row[None, :]
        known = (chunk < count)[:, None] & present[None, :]
        maxima = tl.load(chunk_largest_ptr + place, mask=known, other=float("-inf"))
        sums = tl.load(chunk_sum_ptr + place, mask=known, other=0.0)
        larger = tl.maximum(largest, tl.max(maxima, axis=0))
        total *= tl.exp(largest - larger)
        total += tl.sum(sums * tl.exp(maxima - larger[None, :]), axis=0)
        largest = larger
    tl.store(largest_ptr + tile * COUNT + row, largest, mask=present)
    tl.store(total_ptr + tile * COUNT + row, total, mask=present)


@triton.jit
def mass_of_pages(
    tile, page, wanted, width, rows, first_row,
    peak_ptr, largest_ptr, total_ptr,
    ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Shares of mass that a block of a tile's rows has in pages, 0 where none is wanted.

    `tile` is where the tile lies, `page` an int32 block, `wanted` an int1 block of those to tell
    about, `width` how many a tile has in memory. The tile has `rows` rows, COUNT in memory; the
    block has ROWS from `first_row` on. For the rest see `Peaks` and `Ranking`. Gives a float32
    block [pages, ROWS].
    """
    row = first_row + tl.arange(0, ROWS)
    present = row < rows
    largest = tl.load(largest_ptr + tile * COUNT + row, mask=present, other=0.0)
    total = tl.load(total_ptr + tile * COUNT + row, mask=present, other=1.0)
    logits = tl.load(
        peak_ptr + (tile * width + page)[:, None] * COUNT + row[None, :],
        mask=wanted[:, None] & present[None, :],
        other=float("-inf"),
    )
    return tl.exp(logits - largest[None, :]) / total[None, :]


@triton.jit(do_not_specialize=["slots", "width"])
def _rank_pages(
    peak_ptr, largest_ptr, total_ptr, bits_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, width,
    near_ptr, columns_ptr, distances_ptr,
    near_tiles, near_pages, columns, distances, dense_tiles,
    PAGES: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    COUNT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Ranks some of a tile's pages."""
    slot = tl.program_id(0)
    at = tl.program_id(1)
    _, own, _, _, queries = tile_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if queries == 0:
        return
    tile = (at * slots + slot).to(tl.int64)
    for first in range(tl.program_id(2) * PAGES, own + 1, tl.num_programs(2) * PAGES):
        page = first + tl.arange(0, PAGES)
        best = tl.zeros([PAGES], tl.float32)
        for first_row in range(0, queries * GROUP, ROWS):
            mass = mass_of_pages(
                tile, page, page <= own, width, queries * GROUP, first_row,
                peak_ptr, largest_ptr, total_ptr, ROWS, COUNT,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(mass, axis=1))
        static = static_pages(
            page, at, own, own, near_ptr, columns_ptr, distances_ptr,
            near_tiles, near_pages, columns, distances, dense_tiles, 1,
        )  # fmt: skip
        bits = tl.where(static, STATIC, best.to(tl.int32, bitcast=True))
        tl.store(bits_ptr + tile * width + page, bits, mask=page <= own)
