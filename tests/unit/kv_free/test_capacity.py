"""The choice of units to free, against vLLM's grouping rules written out by hand."""

import numpy as np
import pytest

from dam_vllm.engine.kv_free.bounds import HeadBounds
from dam_vllm.engine.kv_free.capacity import (
    LEAST_GAIN,
    MAX_GROUPS,
    Grouping,
    choose_freeing,
    freed_first,
    group_units,
)

PAGE, LENGTH, IN_FLIGHT = 128, 131072, 4096


def heads_of(bounded, sinks=1, window=8):
    """Heads that all read as much, as far as they are bounded."""
    bounded = np.asarray(bounded, dtype=bool)
    full = np.ones(bounded.shape, dtype=np.int64)
    return HeadBounds(PAGE, PAGE, 1024, bounded, full * sinks, full * window)


def choose(heads, split, ranks=None):
    ranks = ranks or [slice(0, heads.bounded.shape[1])]
    return choose_freeing(heads, ranks, LENGTH, IN_FLIGHT, split)


@pytest.mark.parametrize(
    ("kept", "freed", "expected"),
    [
        (32, 0, Grouping(32, 1, 0)),
        (0, 32, Grouping(32, 0, 1)),
        (16, 16, Grouping(16, 1, 1)),
        (13, 12, Grouping(13, 1, 1)),
        (24, 8, Grouping(8, 3, 1)),
        (20, 12, Grouping(12, 2, 1)),
        (1, 31, Grouping(1, 1, 31)),
    ],
)
def test_groups(kept, freed, expected):
    assert group_units(kept, freed) == expected


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_capacity_of_whole_layers(share):
    """Groups without padding: memory is that of the kept layers and a little of the others."""
    layers = np.arange(32) < 32 * share
    (chosen,) = choose(heads_of(np.tile(layers[:, None], (1, 8))), split=False)
    most = chosen.bounds.most_pages(IN_FLIGHT) / (LENGTH / PAGE)
    assert chosen.units == tuple(layers)
    assert chosen.capacity == pytest.approx(1 / (1 - share + share * most), rel=1e-6)


def test_fewer_are_freed_where_a_group_would_stay_half_empty():
    bounded = np.tile((np.arange(32) < 12)[:, None], (1, 8))
    (chosen,) = choose(heads_of(bounded), split=False)
    assert chosen.grouping.groups <= MAX_GROUPS
    most = chosen.bounds.most_pages(IN_FLIGHT)
    tried = [group_units(32 - count, count).pages(1024, most) for count in range(1, 13)]
    assert sum(chosen.units) == 1 + int(np.argmin(tried))
    assert chosen.capacity == pytest.approx(32 * 1024 / min(tried))


def test_more_bounded_heads_never_cost_capacity():
    rng = np.random.default_rng(0)
    order = rng.permutation(64)
    last = 1.0
    for count in range(64):
        bounded = np.isin(np.arange(64), order[: count + 1]).reshape(8, 8)
        found = choose(heads_of(bounded), split=True)
        capacity = found[0].capacity if found else 1.0
        # A slightly better choice of smaller units is left for larger ones.
        assert capacity * LEAST_GAIN >= last
        last = max(last, capacity)


def test_single_heads_need_no_whole_layer():
    bounded = np.zeros((8, 8), dtype=bool)
    bounded[:, ::2] = True
    heads = heads_of(bounded)
    assert choose(heads, split=False) == []
    chosen, *others = choose(heads, split=True)
    assert chosen.heads == 4
    assert chosen.units == (1,) * 8
    assert chosen.capacity > 1.8
    assert {other.heads for other in others} == {1, 2}


def test_whole_layers_are_taken_where_units_gain_no_more():
    chosen, *_ = choose(heads_of(np.tile(np.arange(8)[:, None] < 4, (1, 8))), split=True)
    assert chosen.heads == 8


def test_bounds_cover_every_head_that_is_freed():
    rng = np.random.default_rng(1)
    heads = heads_of(rng.random((6, 8)) < 0.6)
    heads.sinks[:] = rng.integers(1, 5, (6, 8))
    heads.window[:] = rng.integers(0, 9, (6, 8))
    ranks = [slice(0, 4), slice(4, 8)]
    for choice in choose(heads, split=True, ranks=ranks):
        for layer, units in enumerate(choice.units):
            for rank in ranks:
                freed = freed_first(heads, layer, rank)[: units * choice.heads]
                for head in freed:
                    at = (layer, rank.start + head)
                    assert heads.bounded[at]
                    assert heads.sinks[at] <= choice.bounds.sinks
                    assert heads.window[at] <= choice.bounds.window


def test_every_rank_frees_as_many_units():
    bounded = np.zeros((4, 8), dtype=bool)
    bounded[:, :6] = True
    ranks = [slice(0, 4), slice(4, 8)]
    chosen = choose(heads_of(bounded), split=True, ranks=ranks)[0]
    assert chosen.heads == 2
    assert chosen.units == (1,) * 4


def test_nothing_is_chosen_for_short_lengths():
    heads = heads_of(np.ones((4, 4)))
    assert choose_freeing(heads, [slice(0, 4)], 4096, IN_FLIGHT, True) == []
