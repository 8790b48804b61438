"""Choice of pages on a GPU: the rank from which on a tile's pages are enough for its budget.

Nothing is sorted. The more pages, the nearer to any budget, so the rank is found by bisection
over the bits of a float32; what is searched for mass is only what each step adds or leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.choose import Budget
from dam_vllm.attention.triton_geometry import DeviceTiles
from dam_vllm.attention.triton_rank import STATIC, Ranking, mass_of_pages
from dam_vllm.attention.triton_score import Peaks, Rows, tile_of_rows
from dam_vllm.masks.dynamic import BudgetKind

SCAN = 1024
ELEMENTS = 4096
SHARE = tl.constexpr(int(BudgetKind.SHARE))
MASS = tl.constexpr(int(BudgetKind.MASS))
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
        any_mass: whether any is one of mass.
    """

    kinds: torch.Tensor
    values: torch.Tensor
    floors: torch.Tensor
    caps: torch.Tensor
    any_mass: bool

    @classmethod
    def of(cls, budgets: Sequence[Budget], device: torch.device) -> "DeviceBudgets":
        """The same budgets on a device."""
        kinds, floors, caps = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in zip(*((each.kind, each.floor, each.cap) for each in budgets), strict=True)
        )
        values = torch.tensor([each.value for each in budgets], device=device)
        any_mass = any(each.kind == BudgetKind.MASS for each in budgets)
        return cls(kinds, values, floors, caps, any_mass)


def choose_pages(
    chosen: torch.Tensor,
    peaks: Peaks,
    ranking: Ranking,
    tiles: DeviceTiles,
    budgets: DeviceBudgets,
    rows: Rows,
    page: int,
) -> None:
    """Chooses pages for all tiles of one query, or for all longer ones.

    Args:
        chosen: uint8 [heads, slots, pages], zeros, where chosen pages become 1.
        peaks: of these tiles.
        ranking: of these tiles.
        tiles: of one page each.
        budgets: of the heads.
        rows: which tiles.
        page: tokens a page.
    """
    n, slots, width, count = peaks.logits.shape
    whole = triton.next_power_of_2(max(16, count))
    _choose_pages[(slots, n)](
        chosen, *chosen.stride()[:2], ranking.bits, peaks.logits, ranking.largest, ranking.total,
        budgets.kinds, budgets.values, budgets.floors, budgets.caps,
        *tiles.arguments, slots, width,
        ANY_MASS=budgets.any_mass, SCAN=SCAN, PAGES=max(1, ELEMENTS // whole), WHOLE=whole,
        GROUP=rows.group, QUERIES=rows.queries, COUNT=count, PAGE=page,
    )  # fmt: skip


@triton.jit
def _mass_between(
    low, high, tile, first, stop, width, rows, bits_ptr, peak_ptr, largest_ptr, total_ptr,
    PAGES: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Each row's mass in the pages of a range with low <= rank < high: float32 [WHOLE]."""
    mass = tl.zeros([WHOLE], tl.float32)
    for start in range(first, stop, PAGES):
        page = start + tl.arange(0, PAGES)
        bits = tl.load(bits_ptr + tile * width + page, mask=page < stop, other=0)
        shares = mass_of_pages(
            tile, page, (bits >= low) & (bits < high), width, rows, 0,
            peak_ptr, largest_ptr, total_ptr, WHOLE, COUNT,
        )  # fmt: skip
        mass += tl.sum(shares, axis=0)
    return mass


@triton.jit
def _between(
    low, high, tile, own, width, rows, counts_mass, bits_ptr, peak_ptr, largest_ptr, total_ptr,
    ANY_MASS: tl.constexpr, SCAN: tl.constexpr, PAGES: tl.constexpr, WHOLE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Counts a tile's pages with low <= rank < high, and sums each row's mass in them.

    Returns:
        int32, and float32 [WHOLE]: zeros unless `counts_mass`.
    """
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([WHOLE], tl.float32)
    for first in range(0, own + 1, SCAN):
        page = first + tl.arange(0, SCAN)
        bits = tl.load(bits_ptr + tile * width + page, mask=page <= own, other=0)
        found = tl.sum(((bits >= low) & (bits < high)).to(tl.int32))
        count += found
        if ANY_MASS:
            if counts_mass & (found > 0):
                mass += _mass_between(
                    low, high, tile, first, tl.minimum(first + SCAN, own + 1), width, rows,
                    bits_ptr, peak_ptr, largest_ptr, total_ptr, PAGES, WHOLE, COUNT,
                )  # fmt: skip
    return count, mass


@triton.jit(do_not_specialize=["slots", "width"])
def _choose_pages(
    chosen_ptr, chosen_head, chosen_slot, bits_ptr, peak_ptr, largest_ptr, total_ptr,
    kind_ptr, value_ptr, floor_ptr, cap_ptr,
    request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, slots, width,
    ANY_MASS: tl.constexpr, SCAN: tl.constexpr, PAGES: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Chooses a tile's pages."""
    slot = tl.program_id(0)
    at = tl.program_id(1)
    _, own, _, _, queries = tile_of_rows(
        slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, PAGE, QUERIES
    )
    if queries == 0:
        return
    tile = (at * slots + slot).to(tl.int64)
    rows = queries * GROUP
    kind = tl.load(kind_ptr + at)
    value = tl.load(value_ptr + at)
    floor = tl.load(floor_ptr + at)
    cap = tl.load(cap_ptr + at)
    counts_mass = kind == MASS
    counted = tl.where(kind == SHARE, tl.ceil(value * (own + 1) - 1e-6), value)
    counted = tl.minimum(tl.maximum(counted.to(tl.int32), floor), cap)
    # So many are enough in any case; fewer than the floor never are.
    needed = tl.where(counts_mass, cap, counted)
    step = tl.where(counts_mass, OCTAVE, HALVES)
    # Rows that are not there want nothing.
    wanted = tl.where(tl.arange(0, WHOLE) < rows, value - 1e-6, 0.0)

    _, mass = _between(
        STATIC, 2 * STATIC - 1, tile, own, width, rows, counts_mass,
        bits_ptr, peak_ptr, largest_ptr, total_ptr, ANY_MASS, SCAN, PAGES, WHOLE, COUNT,
    )  # fmt: skip
    count = tl.zeros([], tl.int32)
    # Pages from `high` on are too few, those from `low` on are enough or all that have mass.
    high = tl.zeros([], tl.int32) + STATIC
    low = tl.where(_is_enough(count, mass, wanted, floor, needed, counts_mass), high, 1)
    left = own + 1
    while (high - low > 1) & (left > 1):
        middle = tl.maximum(low + (high - low) // 2, high - step)
        found, more = _between(
            middle, high, tile, own, width, rows, counts_mass,
            bits_ptr, peak_ptr, largest_ptr, total_ptr, ANY_MASS, SCAN, PAGES, WHOLE, COUNT,
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
        bits = tl.load(bits_ptr + tile * width + page, mask=page <= own, other=0)
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
