"""Pages of dynamic heads on a GPU: scored, ordered and chosen, as many blocks at a time as fit."""

from dataclasses import replace

import torch
import triton

from dam_vllm.attention.cuda.dynamic import DeviceDynamic
from dam_vllm.attention.cuda.page_scores import PageBlocks, PageMaxScores, Rows
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks
from dam_vllm.attention.cuda.score import score_pages
from dam_vllm.attention.cuda.scratch import ALIGNMENT, Room
from dam_vllm.attention.cuda.select import choose_pages
from dam_vllm.attention.cuda.shares import share_pages

# Bytes of scores that are held at once, in so many tensors.
SCRATCH, TENSORS = 256 << 20, 8
# Tensors cut at other slots would be aligned otherwise, and kernels compiled anew.
SLOT_STEP = 16


def slot_bytes(heads: int, width: int, page: int, rows: Rows) -> int:
    """Bytes for the scores and shares of a query block's pages, `width` of them."""
    chunks = triton.cdiv(width, PageBlocks(page).chunk)
    return 4 * heads * (rows.count * (width + 2 * chunks + 2) + width)


def choice_bytes(
    heads: int, slots: int, width: int, page: int, heads_per_kv: int, most_queries: int
) -> int:
    """Bytes for scores that `choose_on_device` works best with, for steps up to such a size.

    Args:
        heads: dynamic heads.
        slots: query blocks.
        width: pages of the longest request.
        page: tokens a page.
        heads_per_kv: query heads a KV head.
        most_queries: most queries of a query block.
    """
    each = [
        slot_bytes(heads, width, page, Rows(queries, heads_per_kv))
        for queries in ((1, page) if most_queries > 1 else (1,))
    ]
    scores = max(min(slots, max(SLOT_STEP, SCRATCH // size)) * size for size in each)
    return scores + TENSORS * ALIGNMENT


def choose_on_device(
    dynamic: DeviceDynamic,
    chosen: torch.Tensor,
    chosen_rows: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    query_blocks: DeviceQueryBlocks,
    width: int,
    homes: Homes | None = None,
    room: Room | None = None,
) -> None:
    """Chooses each query block's pages from its queries and the cache; the host does not wait.

    Args:
        dynamic: the layer's dynamic heads.
        chosen: uint8 [rows, slots, width], written up to each query block's own page: 1 for pages
            beyond the static ones that are chosen, else 0.
        chosen_rows: int32 [heads], the row of each.
        query: [tokens, kv_heads, heads_per_kv, head_size] of all the layer's KV heads, rotated;
            last dimension contiguous.
        keys: [virtual pages, page, head_size], float16, bfloat16, float32 or fp8; rotated keys of
            the cache, these queries' own included; last dimension contiguous, head size a
            multiple of 8. KV head h of block b is virtual page b * kv_heads + h.
        block_table: int32 [requests, at least width] blocks; what follows a request's last page
            is not read.
        query_blocks: the queries, cut at pages.
        width: pages of the longest request, or more.
        homes: where the heads lie, see `score_pages`.
        room: memory of `choice_bytes` at least, whose last content is lost; None for new memory.
    """
    heads, slots, page = len(dynamic.heads), len(query_blocks), keys.shape[1]
    if room is None:
        most = query_blocks.most_queries
        needed = choice_bytes(heads, slots, width, page, query.shape[2], most)
        room = Room.new(needed, query.device)
    blocks = PageBlocks(page)
    for queries in (1, page) if query_blocks.most_queries > 1 else (1,):
        rows = Rows(queries, query.shape[2])
        room.clear()
        fitting = (room.left - TENSORS * ALIGNMENT) // slot_bytes(heads, width, page, rows)
        step = slots if fitting >= slots else max(1, fitting // SLOT_STEP) * SLOT_STEP
        for first in range(0, slots, step):
            room.clear()
            part = replace(
                query_blocks,
                request=query_blocks.request[first : first + step],
                offset=query_blocks.offset[first : first + step],
            )
            max_scores = PageMaxScores.empty(heads, len(part), width, rows, blocks, room)
            score_pages(
                max_scores, query, keys, block_table, part, dynamic.heads, dynamic.channels,
                dynamic.max_channels, rows, dynamic.scale, dynamic.softcap, homes,
            )  # fmt: skip
            page_shares = share_pages(max_scores, part, dynamic.static, rows, blocks, room)
            target = chosen[:, first : first + step]
            choose_pages(
                target, chosen_rows, max_scores, page_shares, part, dynamic.budgets, rows, page
            )
