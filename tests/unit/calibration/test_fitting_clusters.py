"""Anchors and readers: who is proposed, and what is chosen at a price."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dam_vllm.calibration.fit.anchors import NONE, SLOTS, proposals, shares, slots
from dam_vllm.calibration.fit.candidates import DENSE, REUSE, Candidate
from dam_vllm.calibration.fit.clusters import Pairs, settle
from dam_vllm.calibration.fit.costs import MEASURED, TAILS, choosing_costs, tail_costs
from dam_vllm.calibration.fit.curve import Options, curve
from dam_vllm.calibration.fit.losses import Sums
from dam_vllm.calibration.fit.run import _Fit
from dam_vllm.calibration.settings import FitConfig
from dam_vllm.masks.budget import TopK


def pays(own, dense, pairs, chosen, anchors):
    """What a choice pays in all, told head by head."""
    table = {
        (head, anchor): row
        for head, anchor, row in zip(pairs.head, pairs.anchor, pairs.priced, strict=True)
    }
    total = 0.0
    for head, index in enumerate(chosen):
        if index == DENSE:
            total += dense
        elif index == REUSE:
            total += table[head, anchors[head]][chosen[anchors[head]]]
        else:
            total += own[head, index]
    return total


def best(own, dense, pairs):
    """The cheapest choice of all that there are: each set of anchors with each budget."""
    heads, count = own.shape
    alone = np.minimum(own.min(axis=1), dense)
    least = np.inf
    for lot in itertools.product([NONE, *range(count)], repeat=heads):
        total = 0.0
        for head, index in enumerate(lot):
            if index != NONE:
                total += own[head, index]
                continue
            reads = [
                row[lot[anchor]]
                for one, anchor, row in zip(pairs.head, pairs.anchor, pairs.priced, strict=True)
                if one == head and lot[anchor] != NONE
            ]
            total += min([alone[head], *reads])
        least = min(least, total)
    return least


def random_pairs(rng, heads, count):
    head, anchor = np.array([(b, a) for a in range(heads) for b in range(a + 1, heads)]).T
    priced = rng.random((len(head), count)) * 0.5
    priced[rng.random(priced.shape) < 0.2] = np.inf
    return Pairs(head, anchor, priced)


def test_clusters_come_close_to_the_best_choice(rng):
    excess = []
    for _ in range(20):
        own = rng.random((5, 3)) + 0.3
        pairs = random_pairs(rng, 5, 3)
        chosen, anchors = settle(own, 0.9, pairs)
        assert (chosen[anchors[anchors != NONE]] >= 0).all()
        np.testing.assert_array_equal(chosen == REUSE, anchors != NONE)
        found = pays(own, 0.9, pairs, chosen, anchors)
        least = best(own, 0.9, pairs)
        assert least - 1e-9 <= found <= np.minimum(own.min(axis=1), 0.9).sum() + 1e-9
        excess.append(found / least - 1)
    assert np.mean(excess) < 0.05


def test_an_anchor_takes_a_larger_budget_for_its_readers():
    """Alone, head 0 is best off with its candidate 0; three readers need candidate 1."""
    own = np.array([[0.1, 0.3, np.inf]] + [[0.9, 0.9, 0.5]] * 3)
    pairs = Pairs(np.array([1, 2, 3]), np.array([0, 0, 0]), np.array([[0.9, 0.2, np.inf]] * 3))
    chosen, anchors = settle(own, 1.0, pairs)
    assert chosen.tolist() == [1, REUSE, REUSE, REUSE]
    assert anchors.tolist() == [NONE, 0, 0, 0]
    one = Pairs(pairs.head[:1], pairs.anchor[:1], np.array([[0.9, 0.45, np.inf]]))
    assert settle(own, 1.0, one)[0].tolist() == [0, 2, 2, 2]
    assert settle(own, 0.4, one)[0].tolist() == [0, DENSE, DENSE, DENSE]


def test_a_curve_counts_readers_without_choosing():
    """Two heads alike: the second reads the first's pages and pays its density alone."""
    risks = np.array([[[[0.2, 1e-4]] * 2]])
    densities = np.array([[[0.05, 0.2]] * 2])
    costs = densities + np.array([0.0, 0.4])
    read = np.array([[[[1.0, 1.0]], [[1.0, 0.22]]]])
    read_risks = np.array([[[[[np.inf, np.inf]], [[np.inf, 2e-4]]]]])
    options = Options(
        np.stack([risks, risks]), densities, np.stack([costs, costs + 0.01]), [0],
        anchors=np.array([[[NONE], [0]]]),
        read_risks=np.stack([read_risks, read_risks]),
        read_densities=read,
        read_costs=np.stack([read, read + 0.01]),
    )  # fmt: skip
    found = [each for each in curve(options) if (each.chosen == REUSE).any()]
    assert [each.chosen.tolist() for each in found] == [[[1, REUSE]]]
    assert found[0].anchors.tolist() == [[NONE, 0]]
    assert found[0].loss == pytest.approx(3e-4)
    assert found[0].density == pytest.approx(0.21)
    assert found[0].cost == pytest.approx((0.6 + 0.22) / 2)
    assert not found[0].tails.any()
    for each in curve(options.allowing(None)):
        assert (each.chosen != REUSE).all()
    allowed = curve(options.allowing(np.array([[NONE, 0]])))
    assert any((each.chosen == REUSE).any() for each in allowed)


def test_shares_are_the_worst_stratums(rng):
    layers, kv_heads = 3, 2
    sums = Sums.empty(["a/context/1", "a/reply/1"], layers, kv_heads, 1)
    sums.alone[:] = rng.random(sums.alone.shape)
    sums.kept[:] = sums.alone[..., None, None] + rng.random(sums.kept.shape)
    for layer in range(layers):
        sums.kept[layer, :, :, layer + 1 :] = 0.0
    found = shares(sums)
    for head, anchor in itertools.product(range(6), repeat=2):
        (layer, local), (of_layer, of_head) = divmod(head, 2), divmod(anchor, 2)
        each = [
            sums.kept[layer, stratum, local, of_layer, of_head]
            / sums.kept[layer, stratum, local, layer, local]
            for stratum in range(2)
        ]
        assert found[head, anchor] == pytest.approx(min(each))
        alone = sums.alone[layer, :, local] / sums.kept[layer, :, local, layer, local]
        assert found[head, -1] == pytest.approx(alone.min())


def test_anchors_are_of_the_same_rank(rng):
    sums = Sums.empty(["a/context/1"], 2, 4, 1)
    sums.alone[:] = 1.0
    sums.kept[:] = 1.0 + rng.random(sums.kept.shape)
    whole = shares(sums)
    for ranks in (1, 2, 4, 8):
        found = shares(sums, ranks)
        each = max(1, 4 // ranks)
        for head, anchor in itertools.product(range(8), repeat=2):
            same = head % 4 // each == anchor % 4 // each
            assert found[head, anchor] == (whole[head, anchor] if same else 0.0)
        np.testing.assert_array_equal(found[:, -1], whole[:, -1])


def test_proposals_follow_earlier_heads_that_keep_most(rng):
    heads, kv_heads = 12, 3
    found = rng.random((heads, heads + 1)) * 0.8
    found[:, -1] *= 0.2
    layer = np.arange(heads) // kv_heads
    found[:, :-1][layer[:, None] < layer] = 0.0
    np.fill_diagonal(found[:, :-1], 1.0)
    every = proposals(found, kv_heads)
    for one in every:
        anchors = sorted(set(one.anchors.tolist()) - {NONE})
        if one.name == "one a layer":
            assert len(set(layer[anchors])) == len(anchors)
        else:
            assert len(anchors) <= int(one.name.split()[0])
        for head, anchor in enumerate(one.anchors):
            if anchor == NONE:  # an anchor itself, though perhaps nobody's, or before all of them
                continue
            assert head not in anchors
            assert layer[anchor] <= layer[head]
            assert found[head, anchor] == found[head, anchors].max()
        assert (one.anchors != NONE).sum() >= heads / 3
    measured = slots(every, found)
    assert measured.shape == (heads, SLOTS)
    for head, row in enumerate(measured):
        kept = [anchor for anchor in row.tolist() if anchor != NONE]
        assert head not in kept
        assert len(set(kept)) == len(kept)
        wanted = dict.fromkeys(int(one.anchors[head]) for one in every)
        assert set(list(wanted)[:SLOTS]) - {NONE} <= set(kept)


def test_a_head_that_all_could_follow_is_proposed():
    """Head 1's pages hold all that others of its layer and the next look for."""
    found = np.eye(6, 7) + 0.1 * (np.arange(7) == 6)
    found[:, 1] = 1.0
    for one in proposals(found, 2):
        assert one.anchors.tolist() == [1, NONE, 1, 1, 1, 1]


def test_choosing_costs_what_it_does_where_the_masks_are_served():
    config = FitConfig(target_density=0.5, platform="cuda")
    fit = _Fit(SimpleNamespace(config=config, model=torch.nn.Linear(1, 1)), [])
    found = fit._choosing([Candidate(0), Candidate(0, 32, TopK(1, 0, 1))], 128)
    np.testing.assert_array_equal(found, choosing_costs("cuda", 128, np.array([0, 32])))


def test_choosing_costs_are_those_of_the_table_and_between():
    """Scoring grows with the channels, rotation does not."""
    for size, each in MEASURED["cpu"].items():
        channels = each.channels
        found = choosing_costs("cpu", size, np.array([0, channels, channels // 2]))
        whole, half = each.choosing + each.rotation, each.choosing / 2 + each.rotation
        np.testing.assert_allclose(found, [0.0, whole, half])
    between = choosing_costs("cpu", 96, np.array([24]))[0]
    low, high = (choosing_costs("cpu", size, np.array([size // 4]))[0] for size in (64, 128))
    assert min(low, high) < between < max(low, high)
    largest = MEASURED["cpu"][128]
    beyond = choosing_costs("cpu", 256, np.array([2 * largest.channels]))[0]
    assert beyond == pytest.approx(largest.choosing + largest.rotation)


def test_a_tail_costs_more_where_more_is_read():
    for size, each in TAILS["cpu"].items():
        found = tail_costs("cpu", size, np.array([0.0, 0.5]))
        np.testing.assert_allclose(found, [each.means, each.means + each.sums / 2])
    between = tail_costs("cpu", 96, np.array([0.5]))[0]
    low, high = (tail_costs("cpu", size, np.array([0.5]))[0] for size in (64, 128))
    assert min(low, high) < between < max(low, high)
    config = FitConfig(target_density=0.5, platform="cpu", choosing_cost=2.0)
    fit = _Fit(SimpleNamespace(config=config, model=torch.nn.Linear(1, 1)), [])
    costs, densities = np.array([[0.3, 0.2]]), np.array([[0.1, 0.2]])
    alone, with_tail = fit._with_tails(costs, densities, 64)
    np.testing.assert_array_equal(alone, costs)
    np.testing.assert_allclose(with_tail, costs + 2 * tail_costs("cpu", 64, densities))
