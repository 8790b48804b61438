"""Masks of other points of the frontier, and which point a target takes."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.frontier_arrays import Frontier, inflate, unpack_pattern
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.targets import TargetError, at_point, at_target
from tests.frontiers import DENSITY, PATTERN, with_frontier


@pytest.fixture
def points(random_masks):
    """Masks of four choices; in the third a head reuses another's pages."""
    found = [random_masks(layers=3, pcl=75, dynamic=True, dense=index == 1) for index in range(4)]
    rotations = found[0].dynamic.rotations
    found = [replace(m, dynamic=replace(m.dynamic, rotations=rotations)) for m in found]
    found[2].modes[2, 0] = HeadMode.REUSE
    anchors = np.full((3, 2, 2), -1, dtype=np.int32)
    anchors[2, 0] = 0, 1
    found[2] = replace(found[2], anchors=anchors)
    return found


def assert_equal(found, expected):
    for name in (*PATTERN, "modes", "anchors"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name, array in vars(found.dynamic).items():
        np.testing.assert_array_equal(array, getattr(expected.dynamic, name), name)


def test_every_point_gives_its_masks_also_from_a_file(points, tmp_path):
    masks = with_frontier(points)
    save_mask_set(masks, tmp_path / "masks.safetensors")
    loaded = load_mask_set(tmp_path / "masks.safetensors")
    for index, expected in enumerate(points):
        for each in (masks, loaded, at_point(masks, 3 - index)):
            assert_equal(at_point(each, index), expected)
    assert_equal(at_target(loaded), points[0])
    assert at_target(loaded).header == masks.header


@pytest.mark.parametrize(
    ("target", "point"),
    [
        ({"target_density": 0.05}, 0),
        ({"target_density": 0.29}, 2),
        ({"target_density": 1.0}, 3),
        ({"target_error": 0.5}, 1),  # cheaper than the first, and better
        ({"target_error": 0.05}, 2),
        ({"target_error": 0.010001}, 3),
    ],
)
def test_a_target_takes_the_best_within_it(points, target, point):
    masks = at_target(with_frontier(points), **target)
    assert_equal(masks, points[point])
    fit = masks.header.parameters["fit"]
    assert fit["chosen"]["density"] == pytest.approx(DENSITY[point])
    assert fit["retargeted"] == target
    assert not {"check", "heads"} & fit.keys()
    assert masks.header.quality is None
    assert_equal(at_target(masks, target_density=0.05), points[0])


def test_what_the_frontier_does_not_reach_is_refused(points):
    masks = with_frontier(points)
    with pytest.raises(TargetError, match=r"target_density is 0\.049: must be at least 0\.05;"):
        at_target(masks, target_density=0.049)
    with pytest.raises(TargetError, match=r"must be at least 0\.01; .* reach from there to 0\.4$"):
        at_target(masks, target_error=0.0099)
    with pytest.raises(TargetError, match="holds no frontier"):
        at_target(replace(masks, frontier=None), target_error=0.1)


def test_the_bound_that_is_told_is_granted(points, rng):
    masks = with_frontier(points)
    odd = rng.random(4).astype(np.float32) * 10.0 ** -rng.integers(0, 5, 4)
    masks = replace(masks, frontier=replace(masks.frontier, kl=odd.astype(np.float32)))
    with pytest.raises(TargetError) as refused:
        at_target(masks, target_error=float(odd.min()) * 0.9)
    told = float(str(refused.value).split("at least ")[1].split(";")[0])
    at_target(masks, target_error=told)
    assert told <= odd.min() * 1.001


def test_patterns_are_stored_once_and_checked(points):
    masks = with_frontier([points[0]] * 4)
    assert len(masks.frontier.offsets) - 1 <= masks.layers * masks.kv_heads
    packed = masks.frontier.pattern(0)
    size = masks.true_bits.shape[-1]
    unpack_pattern(packed, 2, 75, size)
    for damaged in (packed[:-1], packed[:-8] + bytes(8), b""):
        with pytest.raises(ValueError, match="a pattern is damaged"):
            unpack_pattern(damaged, 2, 75, size)
    with pytest.raises(ValueError, match="another number of bytes"):
        inflate(packed, 5)


def test_arrays_of_another_shape_are_refused(points):
    masks = with_frontier(points)
    for each in fields(Frontier):
        array = getattr(masks.frontier, each.name)
        with pytest.raises(ValueError, match=r"frontier\."):
            replace(masks, frontier=replace(masks.frontier, **{each.name: array[:-1]}))
    for name in ("density", "kl", "top1", "cost"):
        odd = np.full(4, np.nan, np.float32)
        with pytest.raises(ValueError, match=rf"frontier\.{name}\[0\] is nan"):
            replace(masks, frontier=replace(masks.frontier, **{name: odd}))
    beyond = masks.frontier.patterns * 0 + 99
    with pytest.raises(ValueError, match=r"frontier\.patterns\[0, 0, 0\] is 9"):
        replace(masks, frontier=replace(masks.frontier, patterns=beyond))
