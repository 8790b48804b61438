"""Choice of pages on a GPU: the rank from which on a query block's pages are enough for its budget.

Nothing is sorted. The more pages, the nearer to any budget, so the rank is found by bisection
over the bits of a float32; what is searched for mass is only what each step adds or leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.plan import DeviceQueryBlocks
from dam_vllm.attention.cuda.score import (
    PageBlocks,
    PageMaxScores,
    Rows,
    query_block_of_rows,
    score_pages,
)
from dam_vllm.attention.cuda.shares import STATIC, PageShares, mass_of_pages, share_pages
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.masks.budget import Budget, BudgetKind
from dam_vllm.masks.page_tables import PageSelector

SCAN = 1024
ELEMENTS = 4096
SHARE = tl.constexpr(int(BudgetKind.SHARE))
TOP_P = tl.constexpr(int(BudgetKind.TOP_P))
# Steps of the search: a power of two of mass downwards, so that few pages are ever looked at ...
OCTAVE = tl.constexpr(1 << 23)
# ... or by halves alone, where pages are only counted.
HALVES = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class DeviceBudgets:
    """Budgets of KV heads, see `Budget`.

    Attributes:
        kinds: int32 [heads], a `BudgetKind` each.
        values: float32 [heads].
        floors: int32 [heads], pages.
        caps: int32 [heads], pages.
        any_top_p: whether any is one of mass.
    """

    kinds: torch.Tensor
    values: torch.Tensor
    floors: torch.Tensor
    caps: torch.Tensor
    any_top_p: bool

    @classmethod
    def of(cls, budgets: Sequence[Budget], device: torch.device) -> "DeviceBudgets":
        """The same budgets on a device."""
        kinds, floors, caps = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in zip(*((each.kind, each.floor, each.cap) for each in budgets), strict=True)
        )
        values = torch.tensor([each.value for each in budgets], device=device)
        any_top_p = any(each.kind == BudgetKind.TOP_P for each in budgets)
        return cls(kinds, values, floors, caps, any_top_p)


def choose_pages(
    chosen: torch.Tensor,
    max_scores: PageMaxScores,
    page_shares: PageShares,
    query_blocks: DeviceQueryBlocks,
    budgets: DeviceBudgets,
    rows: Rows,
    page: int,
) -> None:
    """Chooses pages for all query blocks of one query, or for all longer ones.

    Args:
        chosen: uint8 [heads, slots, pages], zeros, where chosen pages become 1.
        max_scores: of these query blocks.
        page_shares: of these query blocks.
        query_blocks: of one page each.
        budgets: of the heads.
        rows: which query blocks.
        page: tokens a page.
    """
    n, slots, width, count = max_scores.logits.shape
    whole = triton.next_power_of_2(max(16, count))
    _choose_pages[(slots, n)](
        chosen, *chosen.stride()[:2], page_shares.bits, max_scores.logits, page_shares.largest,
        page_shares.total, budgets.kinds, budgets.values, budgets.floors, budgets.caps,
        *query_blocks.arguments, slots, width,
        ANY_TOP_P=budgets.any_top_p, SCAN=SCAN, PAGES=max(1, ELEMENTS // whole), WHOLE=whole,
        GROUP=rows.group, QUERIES=rows.queries, COUNT=count, PAGE=page,
    )  # fmt: skip


@triton.jit
def _mass_between(
    low, high, query_block, first, stop, width, rows, bits_ptr, max_score_ptr, largest_ptr,
    total_ptr,
    PAGES: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Each row's mass in the pages of a range with low <= rank < high: float32 [WHOLE]."""
    mass = tl.zeros([WHOLE], tl.float32)
    for start in range(first, stop, PAGES):
        page = start + tl.arange(0, PAGES)
        bits = tl.load(bits_ptr + query_block * width + page, mask=page < stop, other=0)
        shares = mass_of_pages(
            query_block, page, (bits >= low) & (bits < high), width, rows, 0,
            max_score_ptr, largest_ptr, total_ptr, WHOLE, COUNT,
        )  # fmt: skip
        mass += tl.sum(shares, axis=0)
    return mass


@triton.jit
def _between(
    low, high, query_block, own, width, rows, counts_mass, bits_ptr, max_score_ptr, largest_ptr,
    total_ptr,
    ANY_TOP_P: tl.constexpr, SCAN: tl.constexpr, PAGES: tl.constexpr, WHOLE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Counts a query block's pages with low <= rank < high, and sums each row's mass in them.

    Returns:
        int32, and float32 [WHOLE]: zeros unless `counts_mass`.
    """
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([WHOLE], tl.float32)
    for first in range(0, own + 1, SCAN):
        page = first + tl.arange(0, SCAN)
        bits = tl.load(bits_ptr + query_block * width + page, mask=page <= own, other=0)
        found = tl.sum(((bits >= low) & (bits < high)).to(tl.int32))
        count += found
        if ANY_TOP_P:
            if counts_mass & (found > 0):
                mass += _mass_between(
                    low, high, query_block, first, tl.minimum(first + SCAN, own + 1), width, rows,
                    bits_ptr, max_score_ptr, largest_ptr, total_ptr, PAGES, WHOLE, COUNT,
                )  # fmt: skip
    return count, mass


@triton.jit(do_not_specialize=["slots", "width"])
def _choose_pages(
    chosen_ptr, chosen_head, chosen_slot, bits_ptr, max_score_ptr, largest_ptr, total_ptr,
    kind_ptr, value_ptr, floor_ptr, cap_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, width,
    ANY_TOP_P: tl.constexpr, SCAN: tl.constexpr, PAGES: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Chooses a query block's pages."""
    slot = tl.program_id(0)
    at = tl.program_id(1)
    _, own, _, _, queries = query_block_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if queries == 0:
        return
    query_block = (at * slots + slot).to(tl.int64)
    rows = queries * GROUP
    kind = tl.load(kind_ptr + at)
    value = tl.load(value_ptr + at)
    floor = tl.load(floor_ptr + at)
    cap = tl.load(cap_ptr + at)
    counts_mass = kind == TOP_P
    counted = tl.where(kind == SHARE, tl.ceil(value * (own + 1) - 1e-6), value)
    counted = tl.minimum(tl.maximum(counted.to(tl.int32), floor), cap)
    # So many are enough in any case; fewer than the floor never are.
    needed = tl.where(counts_mass, cap, counted)
    step = tl.where(counts_mass, OCTAVE, HALVES)
    # Rows that are not there want nothing.
    wanted = tl.where(tl.arange(0, WHOLE) < rows, value - 1e-6, 0.0)

    _, mass = _between(
        STATIC, 2 * STATIC - 1, query_block, own, width, rows, counts_mass,
        bits_ptr, max_score_ptr, largest_ptr, total_ptr, ANY_TOP_P, SCAN, PAGES, WHOLE, COUNT,
    )  # fmt: skip
    count = tl.zeros([], tl.int32)
    # Pages from `high` on are too few, those from `low` on are enough or all that have mass.
    high = tl.zeros([], tl.int32) + STATIC
    low = tl.where(_is_enough(count, mass, wanted, floor, needed, counts_mass), high, 1)
    left = own + 1
    while (high - low > 1) & (left > 1):
        middle = tl.maximum(low + (high - low) // 2, high - step)
        found, more = _between(
            middle, high, query_block, own, width, rows, counts_mass,
            bits_ptr, max_score_ptr, largest_ptr, total_ptr, ANY_TOP_P, SCAN, PAGES, WHOLE, COUNT,
        )  # fmt: skip
        if _is_enough(count + found, mass + more, wanted, floor, needed, counts_mass):
            low = middle
            left = found
        else:
            high = middle
            left -= found
            count += found
            mass += more
    for first in range(0, own + 1, SCAN):
        page = first + tl.arange(0, SCAN)
        bits = tl.load(bits_ptr + query_block * width + page, mask=page <= own, other=0)
        tl.store(
            chosen_ptr + at.to(tl.int64) * chosen_head + slot.to(tl.int64) * chosen_slot + page,
            ((bits >= low) & (bits < STATIC)).to(tl.uint8),
            mask=page <= own,
        )


@triton.jit
def _is_enough(count, mass, wanted, floor, needed, counts_mass):
    """Whether so many pages, with so much mass a row, fulfil the budget."""
    reached = tl.min((mass >= wanted).to(tl.int32)) > 0
    return (count >= needed) | (counts_mass & (count >= floor) & reached)


# float32 page max scores that are held at once: 256 MiB.
SCRATCH = 1 << 26
# Tensors cut at other slots would be aligned otherwise, and kernels compiled anew.
SLOT_STEP = 16


@dataclass(frozen=True)
class DeviceDynamic:
    """A layer's dynamic heads on one worker's device.

    Attributes:
        heads: int32 [n], KV heads among those of the worker.
        channels: int32 [n], leading channels that score.
        max_channels: the largest of them.
        budgets: of these heads.
        static: page tables of these heads, one layer, query blocks of one page.
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
    """

    heads: torch.Tensor
    channels: torch.Tensor
    max_channels: int
    budgets: DeviceBudgets
    static: PageSelector
    scale: float
    softcap: float

    @classmethod
    def of(cls, dynamic: DynamicHeads) -> "DeviceDynamic":
        """The same heads, on the device of their page tables."""
        device = dynamic.static.near.device
        return cls(
            heads=torch.tensor(dynamic.ids, dtype=torch.int32, device=device),
            channels=torch.tensor(dynamic.channels, dtype=torch.int32, device=device),
            max_channels=max(dynamic.channels),
            budgets=DeviceBudgets.of(dynamic.budgets, device),
            static=dynamic.static,
            scale=dynamic.scale,
            softcap=dynamic.softcap,
        )


def choose_on_device(
    dynamic: DeviceDynamic,
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    query_blocks: DeviceQueryBlocks,
    width: int,
) -> torch.Tensor:
    """Chooses each query block's pages from its queries and the cache; the host does not wait.

    Args:
        dynamic: the layer's dynamic heads.
        query: [tokens, kv_heads, group, head_size] of all the layer's KV heads, rotated; last
            dimension contiguous.
        keys: [virtual pages, page, head_size], float16, bfloat16, float32 or fp8; rotated keys of
            the cache, these queries' own included; last dimension contiguous, head size a
            multiple of 8. KV head h of block b is virtual page b * kv_heads + h.
        block_table: int32 [requests, at least width] blocks; what follows a request's last page
            is not read.
        query_blocks: the queries, cut at pages.
        width: pages of the longest request, or more.

    Returns:
        bool [heads, slots, width], pages beyond the static ones; none for empty slots.
    """
    heads, slots, page = len(dynamic.heads), len(query_blocks), keys.shape[1]
    chosen = torch.zeros(heads, slots, width, dtype=torch.uint8, device=query.device)
    blocks = PageBlocks(page)
    for queries in (1, page) if query_blocks.most_queries > 1 else (1,):
        rows = Rows(queries, query.shape[2])
        fitting = SCRATCH // (heads * width * rows.count) // SLOT_STEP * SLOT_STEP
        step = max(SLOT_STEP, fitting)
        for first in range(0, slots, step):
            part = replace(
                query_blocks,
                request=query_blocks.request[first : first + step],
                offset=query_blocks.offset[first : first + step],
            )
            max_scores = PageMaxScores.empty(heads, len(part), width, rows, blocks, query)
            score_pages(
                max_scores, query, keys, block_table, part, dynamic.heads, dynamic.channels,
                dynamic.max_channels, rows, dynamic.scale, dynamic.softcap,
            )  # fmt: skip
            page_shares = share_pages(max_scores, part, dynamic.static, rows, blocks)
            target = chosen[:, first : first + step]
            choose_pages(target, max_scores, page_shares, part, dynamic.budgets, rows, page)
    return chosen.view(torch.bool)
