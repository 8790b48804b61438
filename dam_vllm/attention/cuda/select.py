"""Choice of pages on a GPU: the share from which on a query block's pages fulfil its budget.

Pages are ordered by their shares of mass (`PageShares`). Where pages are counted the share is found
by bisection. Where mass is, the best pages are sorted, and their masses added up until every row
has enough.
"""

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.dynamic import DeviceBudgets
from dam_vllm.attention.cuda.page_scores import PageMaxScores, Rows
from dam_vllm.attention.cuda.plan import MOVING
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks
from dam_vllm.attention.cuda.score import query_block_of_rows
from dam_vllm.attention.cuda.shares import STATIC, PageShares, mass_of_pages
from dam_vllm.masks.budget import BudgetKind

SCAN = 1024
ELEMENTS = 4096
# Pages that are sorted at a time; few query blocks choose more.
SORTED = 64
SHARE = tl.constexpr(int(BudgetKind.SHARE))
TOP_P = tl.constexpr(int(BudgetKind.TOP_P))


def choose_pages(
    chosen: torch.Tensor,
    chosen_rows: torch.Tensor,
    max_scores: PageMaxScores,
    page_shares: PageShares,
    query_blocks: DeviceQueryBlocks,
    budgets: DeviceBudgets,
    rows: Rows,
    page: int,
) -> None:
    """Chooses pages for all query blocks of one query, or for all longer ones.

    Args:
        chosen: uint8 [rows, slots, pages], where pages become 1 if chosen, else 0.
        chosen_rows: int32 [heads], the row of each.
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
        chosen, chosen_rows, *chosen.stride()[:2], page_shares.bits, max_scores.logits,
        page_shares.largest,
        page_shares.total, budgets.kinds, budgets.values, budgets.floors, budgets.caps,
        *query_blocks.arguments, slots, width,
        ANY_TOP_P=budgets.any_top_p, SCAN=SCAN, SORTED=min(SORTED, SCAN),
        PAGES=min(SORTED, SCAN, max(1, ELEMENTS // whole)), WHOLE=whole,
        HEADS_PER_KV=rows.heads_per_kv, QUERIES=rows.queries, COUNT=count, PAGE=page,
    )  # fmt: skip


@triton.jit
def _threshold_of_count(bits_ptr, own, needed, SCAN: tl.constexpr):
    """The share from which on at least `needed` pages are found, or all that have mass.

    A search by halves over the bits of a share. The first pages' are kept in registers; few query
    blocks have more, which are read again each time.
    """
    first_page = tl.arange(0, SCAN)
    kept = tl.load(bits_ptr + first_page, mask=first_page <= own, other=0)
    low, high = tl.zeros([], tl.int32) + 1, tl.zeros([], tl.int32) + STATIC
    low = tl.where(needed > 0, low, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.sum(((kept >= middle) & (kept < STATIC)).to(tl.int32))
        for first in range(SCAN, own + 1, SCAN):
            page = first + tl.arange(0, SCAN)
            bits = tl.load(bits_ptr + page, mask=page <= own, other=0)
            count += tl.sum(((bits >= middle) & (bits < STATIC)).to(tl.int32))
        if count >= needed:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _best_pages(bits_ptr, own, below, SCAN: tl.constexpr, SORTED: tl.constexpr):
    """The SORTED pages of the highest shares `below` one, best first: share << 32 | page, or 0."""
    best = tl.zeros([SORTED], tl.int64)
    for first in range(0, own + 1, SCAN):
        page = first + tl.arange(0, SCAN)
        bits = tl.load(bits_ptr + page, mask=page <= own, other=0)
        keyed = bits.to(tl.int64) * (1 << 32) + page
        found = tl.topk(tl.where((bits > 0) & (bits < below), keyed, 0), SORTED)
        best = tl.topk(tl.reshape(tl.join(best, found), [2 * SORTED]), SORTED)
    return best


@triton.jit
def _static_mass(
    query_block, own, width, rows, bits_ptr, max_score_ptr, largest_ptr, total_ptr,
    PAGES: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Each row's mass in the pages that are read anyway: float32 [WHOLE]."""
    mass = tl.zeros([WHOLE], tl.float32)
    for first in range(0, own + 1, PAGES):
        page = first + tl.arange(0, PAGES)
        bits = tl.load(bits_ptr + page, mask=page <= own, other=0)
        if tl.max(bits) == STATIC:
            shares = mass_of_pages(
                query_block, page, bits == STATIC, width, rows, 0, max_score_ptr, largest_ptr,
                total_ptr, WHOLE, COUNT,
            )  # fmt: skip
            mass += tl.sum(shares, axis=0)
    return mass


@triton.jit
def _threshold_of_mass(
    query_block, own, width, rows, wanted, floor, cap, bits_ptr, max_score_ptr, largest_ptr,
    total_ptr,
    SCAN: tl.constexpr, SORTED: tl.constexpr, PAGES: tl.constexpr, WHOLE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The share of the last page that is needed until every row has the mass it wants.

    Pages are taken best first, PAGES at a time, so that only pages that are chosen are looked at.
    """
    mass = _static_mass(
        query_block, own, width, rows, bits_ptr, max_score_ptr, largest_ptr, total_ptr,
        PAGES, WHOLE, COUNT,
    )  # fmt: skip
    low = tl.zeros([], tl.int32) + STATIC
    count = tl.zeros([], tl.int32)
    going = cap > 0
    while going:
        best = _best_pages(bits_ptr, own, low, SCAN, SORTED)
        at = tl.zeros([], tl.int32)
        while going & (at < SORTED):
            number = at + tl.arange(0, PAGES)
            keyed = tl.gather(best, number, 0)
            held = (keyed > 0) & (count + number < cap)
            shares = mass_of_pages(
                query_block, (keyed & 0x7FFFFFFF).to(tl.int32), held, width, rows, 0,
                max_score_ptr, largest_ptr, total_ptr, WHOLE, COUNT,
            )  # fmt: skip
            before = mass[None, :] + tl.cumsum(shares, axis=0) - shares
            short = tl.max((before < wanted[None, :]).to(tl.int32), axis=1) > 0
            taken = held & (short | (count + number < floor))
            low = tl.minimum(low, tl.min(tl.where(taken, (keyed >> 32).to(tl.int32), STATIC)))
            mass += tl.sum(shares, axis=0)
            at += PAGES
            going = tl.min(taken.to(tl.int32)) > 0
        count += SORTED
    return low


@triton.jit(
    do_not_specialize=["slots", "width", "chosen_row", "chosen_slot"],
    do_not_specialize_on_alignment=MOVING,
)
def _choose_pages(
    chosen_ptr, row_ptr, chosen_row, chosen_slot, bits_ptr, max_score_ptr, largest_ptr, total_ptr,
    kind_ptr, value_ptr, floor_ptr, cap_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, width,
    ANY_TOP_P: tl.constexpr, SCAN: tl.constexpr, SORTED: tl.constexpr, PAGES: tl.constexpr,
    WHOLE: tl.constexpr, HEADS_PER_KV: tl.constexpr, QUERIES: tl.constexpr, COUNT: tl.constexpr,
    PAGE: tl.constexpr,
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
    kind = tl.load(kind_ptr + at)
    value = tl.load(value_ptr + at)
    floor = tl.load(floor_ptr + at)
    cap = tl.load(cap_ptr + at)
    bits_ptr += query_block * width
    low = tl.zeros([], tl.int32)
    if kind == TOP_P:
        if ANY_TOP_P:
            rows = queries * HEADS_PER_KV
            # Rows that are not there want nothing.
            wanted = tl.where(tl.arange(0, WHOLE) < rows, value - 1e-6, 0.0)
            low = _threshold_of_mass(
                query_block, own, width, rows, wanted, floor, cap,
                bits_ptr, max_score_ptr, largest_ptr, total_ptr, SCAN, SORTED, PAGES, WHOLE, COUNT,
            )  # fmt: skip
    else:
        needed = tl.where(kind == SHARE, tl.ceil(value * (own + 1) - 1e-6), value)
        needed = tl.minimum(tl.maximum(needed.to(tl.int32), floor), cap)
        low = _threshold_of_count(bits_ptr, own, needed, SCAN)
    row = tl.load(row_ptr + at).to(tl.int64)
    _store_chosen(
        chosen_ptr + row * chosen_row + slot.to(tl.int64) * chosen_slot,
        bits_ptr, low, own, SCAN,
    )  # fmt: skip


@triton.jit
def _store_chosen(chosen_ptr, bits_ptr, low, own, SCAN: tl.constexpr):
    """Marks a query block's pages with low <= share that are not static."""
    for first in range(0, own + 1, SCAN):
        page = first + tl.arange(0, SCAN)
        bits = tl.load(bits_ptr + page, mask=page <= own, other=0)
        chosen = (bits >= low) & (bits < STATIC)
        tl.store(chosen_ptr + page, chosen.to(tl.uint8), mask=page <= own)
