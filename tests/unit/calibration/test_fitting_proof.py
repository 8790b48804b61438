"""Which choices are measured, and which of them is taken."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.curve import Point
from dam_vllm.calibration.fit.proof import (
    Curve,
    Prover,
    frontier,
    propose,
    ranked,
    search,
    sweep,
)


def point(loss, density, cost=None):
    cost = density + 0.1 if cost is None else cost
    number = np.full((1, 1), round(density * 100))
    return Point(loss, density, cost, number, number, number == 0)


HOPEFUL = [point(0.0, 1.0), point(0.1, 0.4), point(0.2, 0.2), point(0.9, 0.05)]
WARY = [point(0.0, 1.0), point(0.1, 0.6), point(1.0, 0.3), point(2.0, 0.1)]
CURVES = [Curve("free", 0.0, HOPEFUL), Curve("free", 1.0, WARY)]


class Kept(dict):
    """Proofs by key."""

    proof, save_proof = dict.get, dict.__setitem__


def test_a_choice_is_measured_once_and_its_tails_are_part_of_it():
    prover, asked, store = Prover.__new__(Prover), [], Kept()
    prover._inputs, prover._texts = SimpleNamespace(store=store, advance=None), []
    prover.measure = lambda masks: asked.append(masks) or {"plain": {"kl": 0.1, "top1": 0.9}}
    alone = point(0.5, 0.2)
    tailed = replace(alone, tails=~alone.tails)
    for each, count in ((alone, 1), (tailed, 2), (alone, 2)):
        proven = prover.prove(each, lambda point: point)
        assert (proven.loss, proven.top1) == (0.1, 0.9)
        assert len(asked) == count


def measuring(truth, asked=None):
    """Measures a point by its density."""

    def prove(each):
        if asked is not None:
            asked.append(each.density)
        return replace(each, loss=truth[each.density], top1=0.9)

    return prove


def test_the_measured_loss_decides_within_a_density():
    asked = []
    proven = search(CURVES, None, 0.35, measuring({0.2: 3.0, 0.3: 0.4}, asked))
    assert [(each.density, each.loss) for each in proven] == [(0.3, 0.4), (0.2, 3.0)]
    assert [each.source for each in proven] == ["free, trust 1", "free, trust 0"]
    assert len(asked) == 2


def test_other_assignments_are_measured_for_the_trust_that_was_borne_out():
    others = [
        Curve("none", 0.0, [point(0.0, 1.0), point(0.1, 0.11)]),
        Curve("none", 1.0, [point(0.0, 1.0), point(0.1, 0.12)]),
    ]
    truth = {0.2: 3.0, 0.3: 0.4, 0.11: 0.01, 0.12: 0.2}
    proven = search([*CURVES, *others], None, 0.35, measuring(truth))
    assert [each.density for each in proven] == [0.12, 0.3, 0.2]
    assert proven[0].source == "none, trust 1"


def test_an_error_is_kept_as_measured():
    """A hopeful prediction is corrected until its proposal holds, or dense is left."""
    truth = {0.05: 8.0, 0.2: 1.5, 0.4: 0.6, 0.3: 0.7, 0.6: 0.05, 1.0: 0.0}
    found = propose(CURVES[0], 1.0, None, measuring(truth))
    assert [each.density for each in found] == [0.05, 0.4]
    proven = search(CURVES, 1.0, None, measuring(truth))
    assert (proven[0].density, proven[0].loss) == (0.3, 0.7)
    assert sorted(each.density for each in proven[1:]) == [0.05, 0.4]
    hopeless = measuring(dict.fromkeys((0.05, 0.2, 0.4, 1.0), 9.0))
    found = search(CURVES[:1], 1.0, None, hopeless)
    assert (found[0].density, found[0].loss) == (1.0, 0.0)


def test_an_error_that_the_memory_does_not_allow_is_refused():
    bound = [point(0.1, 0.4), point(0.2, 0.2)]
    with pytest.raises(CalibrationError, match=r"target_error is 0\.05, must be at least 0\.3000"):
        ranked([point(0.3, 0.2)], 0.05, bound[0])


def test_the_frontier_is_swept_around_the_choice():
    curve = {0.0: 1.0, 0.1: 0.5, 0.2: 0.27, 0.25: 0.23, 0.3: 0.2, 0.4: 0.13, 0.5: 0.1}
    points = [point(loss, density) for loss, density in curve.items()]
    truth = {each.density: each.loss * 2 for each in points}
    found = sweep(Curve("free", 0.5, points), points[4], measuring(truth))
    # Half of .2, .7 times, 1.2 times, 1.5 times and 2.5 times as much.
    assert [each.density for each in found] == [0.1, 0.13, 0.23, 0.27, 0.5]
    assert {each.source for each in found} == {"free, trust 0.5"}


def test_the_frontier_holds_no_point_that_another_beats(rng):
    points = [point(*rng.integers(0, 5, 3)) for _ in range(40)]
    kept = frontier(points)
    told = [(each.loss, each.density, each.cost) for each in kept]
    assert len(set(told)) == len(told)
    assert [cost for *_, cost in told] == sorted(cost for *_, cost in told)
    every = {(each.loss, each.density, each.cost) for each in points}
    for one in every:
        beaten = any(
            all(b <= a for a, b in zip(one, other, strict=True)) and other != one for other in every
        )
        assert (one in told) == (not beaten)
