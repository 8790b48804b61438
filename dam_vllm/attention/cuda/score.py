"""Page max scores on a GPU: the largest score that each query row finds in each page of keys.

A matrix product takes the keys of TOKENS tokens, of several small pages or of a part of a large
one; only its maxima over pages leave the registers. Shapes and order depend on the page size and
on whether a query block has one query or more, never on what else is in the batch, so that neither
do results.
"""

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.page_scores import MOST_ROWS, PageBlocks, PageMaxScores, Rows
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.plan import MOVING
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_at

WARPS, STAGES = 8, 2
# Enough to fill any GPU several times; more would only wait, or find nothing to do.
PROGRAMS = 4096
LOWEST = tl.constexpr(-3.0e38)


def lanes(programs: int, chunks: int) -> int:
    """Programs that share a query block's chunks, where there are `programs` without sharing."""
    return max(1, min(chunks, PROGRAMS // programs))


def score_pages(
    max_scores: PageMaxScores,
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    query_blocks: DeviceQueryBlocks,
    heads: torch.Tensor,
    channels: torch.Tensor,
    max_channels: int,
    rows: Rows,
    scale: float,
    softcap: float,
    homes: Homes | None = None,
) -> None:
    """Fills `max_scores` for all query blocks of one query, or for all longer ones.

    Args:
        max_scores: to be filled.
        query: [tokens, kv_heads, heads_per_kv, head_size], rotated; last dimension contiguous.
        keys: [virtual pages, page, head_size], last dimension contiguous; the head size is a
            multiple of 8.
        block_table: int32 [requests, n]; entries after a request's last page are not read.
        query_blocks: of one page each.
        heads: int32 [n], KV heads to score.
        channels: int32 [n], leading channels that score.
        max_channels: the largest of them.
        rows: which query blocks.
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.
        homes: where these heads lie, or None in blocks of all heads; where they lie in groups, the
            block table is [groups, requests, n].
    """
    homes = homes or Homes.of_heads(heads, query.shape[1])
    n, slots, _, count = max_scores.logits.shape
    chunks = max_scores.sums.shape[2]
    blocks = PageBlocks(keys.shape[1])
    # What tensor cores multiply at least; channels beyond a head's own are 0.
    least = 32 if query.element_size() == 1 else 16
    _score_pages[(slots * rows.blocks, n, lanes(slots * rows.blocks * n, chunks))](
        query, keys, block_table, heads, homes.offsets, homes.groups, channels,
        max_scores.logits, max_scores.largest, max_scores.sums, *query_blocks.arguments,
        scale, *query.stride()[:3], *keys.stride()[:2], block_table.stride(0),
        block_table.stride(-2), homes.scale, slots, max_scores.logits.shape[2], chunks,
        HEADS_PER_KV=rows.heads_per_kv, QUERIES=rows.queries, ROWS=rows.block,
        BLOCKS=rows.blocks, COUNT=count,
        PAGE=blocks.page, UNIT=blocks.unit, PARTS=blocks.parts, PAGES=blocks.pages,
        CHUNK=blocks.chunk, CHANNELS=max(least, triton.next_power_of_2(max_channels)),
        SOFTCAP=softcap,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=WARPS if rows.block == MOST_ROWS else WARPS // 2, num_stages=STAGES,
    )  # fmt: skip


@triton.jit
def query_block_of_rows(
    slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr,
    PAGE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A slot's query block of one page, if it is one that a launch takes, see `Rows`.

    Returns:
        Row of the batch, page, first query row, position of the first query, and how many
        queries: none for query blocks that others take.
    """
    request, page, row, start, stop = query_block_at(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE
    )
    queries = tl.maximum(stop - start, 0)
    return request, page, row, start, tl.where((queries > 1) == (QUERIES > 1), queries, 0)


@triton.jit
def _asked(row_ptr, present, channels, CHANNELS: tl.constexpr, UPCAST: tl.constexpr):
    """Leading channels of rows that begin at `row_ptr` [ROWS]: [ROWS, CHANNELS], 0 elsewhere."""
    channel = tl.arange(0, CHANNELS)
    held = present[:, None] & (channel < channels)[None, :]
    asked = tl.load(row_ptr[:, None] + channel[None, :], mask=held, other=0.0)
    if UPCAST:
        asked = asked.to(tl.float32)
    return asked


@triton.jit
def _cap(logits, SOFTCAP: tl.constexpr):
    """Soft-capping by tanh, which 1 - 2 / (e^2x + 1) gives without overflow."""
    if SOFTCAP > 0:
        logits = SOFTCAP - 2 * SOFTCAP / (tl.exp(logits * (2 / SOFTCAP)) + 1)
    return logits


@triton.jit
def _max_scores(
    first, own, asked, position, stop, channels, offset,
    table_ptr, key_ptr, key_page, key_token, kv_heads,
    QUERY: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr,
    PARTS: tl.constexpr, PAGES: tl.constexpr, CHANNELS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The largest causal score of a block of rows in PAGES pages from `first` on.

    `asked` [ROWS, CHANNELS] are queries at `position`, `own` is the query block's own page, `stop`
    the position after its last query, `table_ptr` the request's blocks of `kv_heads` virtual pages,
    the head's at `offset`. Gives float32 [ROWS, PAGES].
    """
    channel = tl.arange(0, CHANNELS)
    token = tl.arange(0, PAGES * UNIT)
    # A limit that divides by 8 lets keys be loaded by vectors; the query is 0 in what is more.
    is_read = channel < (channels + 7) // 8 * 8
    page = first + token // UNIT
    block = tl.load(table_ptr + page, mask=page <= own, other=0)
    virtual = block.to(tl.int64) * kv_heads + offset
    max_scores = tl.full([ROWS, PAGES], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):  # so that the loop over pages is the one to be pipelined
        place = part * UNIT + token % UNIT
        key_position = page * PAGE + place
        cached = tl.load(
            key_ptr + (virtual * key_page + place * key_token)[None, :] + channel[:, None],
            mask=(key_position < stop)[None, :] & is_read[:, None],
            other=0.0,
        ).to(QUERY)
        if UPCAST:
            cached = cached.to(tl.float32)
        scores = tl.dot(asked, cached, input_precision="ieee")
        if first + PAGES > own:
            scores = tl.where(key_position[None, :] <= position[:, None], scores, float("-inf"))
        found = tl.max(tl.reshape(scores, [ROWS, PAGES, UNIT]), axis=2)
        max_scores = tl.maximum(max_scores, found)
    return max_scores


@triton.jit(
    do_not_specialize=["slots", "width", "chunks", "table_group", "table_row"],
    do_not_specialize_on_alignment=MOVING,
)
def _score_pages(
    query_ptr, key_ptr, table_ptr, head_ptr, home_ptr, group_ptr, channels_ptr,
    max_score_ptr, largest_ptr, sum_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr,
    scale, query_token, query_head, query_member, key_page, key_token, table_group, table_row,
    kv_heads, slots, width, chunks,
    HEADS_PER_KV: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    COUNT: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, PARTS: tl.constexpr,
    PAGES: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores some of a query block's chunks for a block of its rows."""
    # Neighbours score the same keys for neighbouring query blocks, which finds them in the L2
    # cache.
    slot = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    at = tl.program_id(1)
    request, own, first_row, start, queries = query_block_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if block * ROWS >= queries * HEADS_PER_KV:
        return
    head = tl.load(head_ptr + at)
    channels = tl.load(channels_ptr + at)
    row = block * ROWS + tl.arange(0, ROWS)
    present = row < queries * HEADS_PER_KV
    asked_ptr = query_ptr + (first_row + row // HEADS_PER_KV).to(tl.int64) * query_token
    asked_ptr += head.to(tl.int64) * query_head + row % HEADS_PER_KV * query_member
    asked = _asked(asked_ptr, present, channels, CHANNELS, UPCAST)
    position = start + row // HEADS_PER_KV
    blocks_ptr = table_ptr + request.to(tl.int64) * table_row
    if group_ptr is not None:
        blocks_ptr += tl.load(group_ptr + at).to(tl.int64) * table_group
    home = tl.load(home_ptr + at)
    query_block = (at * slots + slot).to(tl.int64)
    for chunk in range(tl.program_id(2), own // CHUNK + 1, tl.num_programs(2)):
        largest = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, own + 1), PAGES):
            max_scores = _max_scores(
                first, own, asked, position, start + queries, channels, home,
                blocks_ptr, key_ptr, key_page, key_token, kv_heads, query_ptr.dtype.element_ty,
                ROWS, PAGE, UNIT, PARTS, PAGES, CHANNELS, UPCAST,
            )  # fmt: skip
            logits = _cap(max_scores * scale, SOFTCAP)
            pages = first + tl.arange(0, PAGES)
            logits = tl.where((pages <= own)[None, :], logits, float("-inf"))
            tl.store(
                max_score_ptr + (query_block * width + pages)[None, :] * COUNT + row[:, None],
                logits,
                mask=(pages <= own)[None, :] & present[:, None],
            )
            larger = tl.maximum(largest, tl.max(logits, axis=1))
            total *= tl.exp(largest - larger)
            total += tl.sum(tl.exp(logits - larger[:, None]), axis=1)
            largest = larger
        summary = (query_block * chunks + chunk) * COUNT + row
        tl.store(largest_ptr + summary, largest, mask=present)
        tl.store(sum_ptr + summary, total, mask=present)
