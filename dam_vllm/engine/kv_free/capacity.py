"""Which KV heads to free: the choice with the largest capacity, found by trying all.

vLLM gives one block table to a *group* of KV caches and makes all groups equally large
(v1/core/kv_cache_utils.py, _get_kv_cache_groups_uniform_page_size). A group that is not full
wastes memory, so freeing more heads can cost capacity. What goes into a group is here called a
*unit*: as many KV heads of one layer, all of a tensor-parallel rank's or fewer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dam_vllm.engine.kv_free.bounds import Bounds, HeadBounds
from dam_vllm.masks.rounding import ceil_div

# Each group has its own block table, slot mapping and metadata in every step.
MAX_GROUPS = 8
# Units smaller than a layer cost a little time in every step: they must gain this much more.
LEAST_GAIN = 1.05


@dataclass(frozen=True)
class Grouping:
    """vLLM's groups for units that keep all pages and units that free some.

    Attributes:
        size: units a group, padding included.
        kept: groups of units that keep all pages.
        freed: groups of units that free pages.
    """

    size: int
    kept: int
    freed: int

    @property
    def groups(self) -> int:
        return self.kept + self.freed

    def pages(self, whole: int, most: int) -> int:
        """Unit pages that a request takes.

        Args:
            whole: pages of all its tokens.
            most: pages that a unit which frees holds at most.

        Returns:
            Pages of one unit each, padding included.
        """
        return self.size * (self.kept * whole + self.freed * min(whole, most))


def group_units(kept: int, freed: int) -> Grouping:
    """Groups units as vLLM does.

    Args:
        kept: units that keep all pages.
        freed: units that free pages.

    Returns:
        The groups.
    """
    if not kept or not freed:
        return Grouping(kept + freed, int(kept > 0), int(freed > 0))
    few, many = sorted((kept, freed))
    size = many if many < 1.5 * few else few
    return Grouping(size, ceil_div(kept, size), ceil_div(freed, size))


@dataclass(frozen=True)
class Freeing:
    """A choice of units whose pages are freed.

    Attributes:
        heads: KV heads a unit.
        units: units of each layer and rank that free pages.
        bounds: what these units can read, one for all so that they share groups.
        grouping: vLLM's groups.
        capacity: requests of the model's length that fit into the same memory, over those that
            fit where all pages are kept.
    """

    heads: int
    units: tuple[int, ...]
    bounds: Bounds
    grouping: Grouping
    capacity: float

    def describe(self, local_heads: int) -> str:
        """A few words for the log."""
        what = "whole layers" if self.heads == local_heads else f"units of {self.heads} KV heads"
        total = local_heads // self.heads * len(self.units)
        return (
            f"{self.capacity:.2f}x capacity in {self.grouping.groups} groups by {what} "
            f"({sum(self.units)} of {total})"
        )


def choose_freeing(
    heads: HeadBounds, ranks: Sequence[slice], length: int, in_flight: int, split: bool
) -> list[Freeing]:
    """Tries every number of units of every size.

    Args:
        heads: what each KV head can read.
        ranks: KV heads of each tensor-parallel rank.
        length: the model's length in tokens.
        in_flight: tokens scheduled at a time.
        split: whether units may be smaller than all of a rank's heads of a layer.

    Returns:
        The best choice of each size of unit that gains anything, the one to take first.
    """
    local = ranks[0].stop - ranks[0].start
    sizes = [size for size in range(local, 0, -1) if local % size == 0]
    best: list[Freeing] = []
    for size in sizes if split else sizes[:1]:
        found = max(
            _choices(heads, ranks, size, length, in_flight),
            key=lambda choice: choice.capacity,
            default=None,
        )
        if found is not None and found.capacity >= LEAST_GAIN:
            best.append(found)
    taken = None
    for choice in best:
        if taken is None or choice.capacity >= LEAST_GAIN * taken.capacity:
            taken = choice
    return sorted(best, key=lambda choice: (choice is not taken, -choice.capacity))


def freed_first(heads: HeadBounds, layer: int, rank: slice) -> list[int]:
    """A rank's KV heads of a layer in the order in which they are freed.

    Args:
        heads: what each KV head can read.
        layer: global layer index.
        rank: the rank's KV heads.

    Returns:
        Local ids: bounded heads first, those that read least at the front.
    """
    need = (heads.sinks + heads.window)[layer, rank]
    return [int(head) for head in np.lexsort((need, ~heads.bounded[layer, rank]))]


def _choices(
    heads: HeadBounds, ranks: Sequence[slice], size: int, length: int, in_flight: int
) -> Iterator[Freeing]:
    """Every number of units of a size, those that read least first."""
    layers = len(heads.bounded)
    whole = ceil_div(length, heads.page)
    total = layers * (ranks[0].stop - ranks[0].start) // size
    everything = total * whole
    units, sinks, window = [0] * layers, 0, 0
    for layer, unit_sinks, unit_window in _candidates(heads, ranks, size):
        units[layer] += 1
        sinks, window = max(sinks, unit_sinks), max(window, unit_window)
        bounds = Bounds(heads.page, heads.query_block, sinks, window, heads.start)
        grouping = group_units(total - sum(units), sum(units))
        if grouping.groups <= MAX_GROUPS:
            pages = grouping.pages(whole, bounds.most_pages(in_flight))
            yield Freeing(size, tuple(units), bounds, grouping, everything / pages)


def _candidates(heads: HeadBounds, ranks: Sequence[slice], size: int) -> list[tuple[int, int, int]]:
    """Units that can be freed on every rank: layer, sinks, window; those that read least first."""
    found = []
    for layer in range(len(heads.bounded)):
        count = min(int(heads.bounded[layer, rank].sum()) for rank in ranks) // size
        orders = [(rank.start, freed_first(heads, layer, rank)) for rank in ranks]
        for unit in range(1, count + 1):
            # All of the layer's units so far: a later one must not seem to read less.
            members = [start + head for start, order in orders for head in order[: unit * size]]
            sinks, window = heads.sinks[layer, members], heads.window[layer, members]
            found.append((layer, int(sinks.max()), int(window.max())))
    return sorted(found, key=lambda unit: unit[1] + unit[2])
