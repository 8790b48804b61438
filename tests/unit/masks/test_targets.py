"""Masks of other points of the frontier, and which point a target takes."""

import json
import zlib
from dataclasses import fields, replace

import numpy as np
import pytest

from dam_vllm.masks.file import MaskFileError, load_mask_set, save_mask_set
from dam_vllm.masks.frontier_arrays import Frontier, inflate, pack_pattern, unpack_pattern
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.targets import TargetError, at_point, at_target
from tests.frontiers import DENSITY, PATTERN, with_frontier
from tests.mask_files import Parts


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
    whole = len(zlib.decompress(packed))
    for other in (5, whole - 1, whole + 1):
        with pytest.raises(ValueError, match="another number of bytes"):
            inflate(packed, other)


def test_large_arrays_are_inflated_piece_by_piece(rng):
    """Of bytes that hardly shrink, and of many that shrink to few."""
    for made in (rng.bytes(300_001), bytes(10**7), b""):
        packed = zlib.compress(made)
        found = inflate(packed, len(made))
        assert found.tobytes() == made
        assert found.flags.writeable
        with pytest.raises(ValueError, match="another number of bytes"):
            inflate(packed[:-1], len(made))


def put(name, place, value):
    """A change of one value of a file's frontier."""

    def change(parts):
        parts.arrays[f"frontier.{name}"][place] = value

    return change


def put_pattern(masks, index, name, value):
    """A change of a stored pattern's first query head."""

    def change(parts):
        former = masks.frontier.pattern(index)
        found = unpack_pattern(former, 2, 75, masks.true_bits.shape[-1])
        bits = dict(zip(PATTERN, found, strict=True))
        bits[name] = bits[name].copy()
        bits[name][0] = value
        packed, stored = pack_pattern(*bits.values()), parts.arrays["frontier.bits"].tobytes()
        parts.arrays["frontier.bits"] = np.frombuffer(stored.replace(former, packed), np.uint8)
        parts.arrays["frontier.offsets"][index + 1 :] += len(packed) - len(former)

    return change


def cut_pattern(parts):
    """The first pattern ends early: the second starts in it."""
    parts.arrays["frontier.offsets"][1] -= 3


def without_fit(parts):
    parts.metadata["header"] = json.dumps(parts.header | {"parameters": {}})


MEANINGLESS = [
    (put("budgets", ..., np.nan), r"choice 0: dynamic.budgets\[0, 0\] is nan"),
    (put("kinds", (1, 2, 1), 77), r"choice 1: dynamic.kinds\[2, 1\] is 77"),
    (put("channels", (3, 0, 0), 0), r"choice 3: dynamic.channels\[0, 0\] is 0"),
    (put("caps", (3, 0, 0), -1), r"choice 3: dynamic.caps\[0, 0\] is -1"),
    (put("expected", (3, 0, 0), 2), r"choice 3: dynamic.expected\[0, 0\] is 2"),
    (put("anchors", ..., 12345), "choice 0: a head that reuses no pages has an anchor"),
    (put("anchors", (2, 2, 0), 12345), "choice 2: layer 2, KV head 0 reuses pages of layer 12345"),
    (put("modes", (0, 1, 0), 3), "choice 0: a head reuses pages, but there are no anchors"),
    (cut_pattern, "a pattern is damaged"),
    (without_fit, "there is a frontier, but the header's parameters tell no 'fit'"),
]


def refuse(masks, path, change, message):
    save_mask_set(masks, path)
    parts = Parts.of(path)
    change(parts)
    parts.seal()
    path.write_bytes(parts.bytes())
    with pytest.raises(MaskFileError, match=message) as refused:
        load_mask_set(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(("change", "message"), MEANINGLESS)
def test_what_a_choice_of_a_file_may_not_hold(points, tmp_path, change, message):
    refuse(with_frontier(points), tmp_path / "masks.safetensors", change, message)


def test_patterns_of_a_file_mean_something(points, tmp_path):
    for masks in points:
        masks.header.layer_types[1] = "sliding"
        for name in PATTERN:
            getattr(masks, name)[1] = 0
    masks, path = with_frontier(points), tmp_path / "masks.safetensors"
    left = masks.frontier.patterns[0, 1, 0]
    message = f"pattern {left} has bits, must be zeros for a layer that is left to vLLM"
    refuse(masks, path, put_pattern(masks, left, "columns", True), message)
    message = r"pattern 0, true mask\[0\] ends in byte 255"
    refuse(masks, path, put_pattern(masks, 0, "true_bits", 255), message)


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
