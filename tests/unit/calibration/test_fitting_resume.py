"""The whole fit on a tiny model: what a stopped run leaves, and what is told of it."""

import dataclasses
import itertools
import json
from functools import partial

import numpy as np
import pytest

from dam_vllm.calibration.capture import register
from dam_vllm.calibration.errors import CalibrationStopped
from dam_vllm.calibration.fit.candidates import Pattern
from dam_vllm.calibration.fit.inputs import FitInputs
from dam_vllm.calibration.fit.run import fit_modes
from dam_vllm.calibration.fit.store import FitStore
from dam_vllm.calibration.progress import Reporter, Work
from dam_vllm.calibration.settings import ASSIGNMENTS, TRUSTS, TRUSTS_KEPT, FitConfig
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.model_shape import model_shape
from tests.conftest import random_mask_set
from tests.unit.calibration.conftest import build

pytestmark = pytest.mark.slow

CONFIG = FitConfig(
    target_density=0.9,
    page=16,
    platform="cpu",
    lengths=[660],
    check=3,
    channels=[4, 8],
    query_blocks=1,
    choosing_cost=0.1,
)
LENGTHS = {"plain": (650, 530, 540), "lines": (660, 650, 540)}


def window(distance):
    rng = np.random.default_rng(0)
    empty = random_mask_set(rng, 3, 4, 2, pcl=32, share=0.0, true_share=0.0)
    diagonals = empty.diagonals.copy()
    diagonals[..., :distance] = True
    return dataclasses.replace(empty, diagonals=diagonals)


def fit(folder, after=None, config=CONFIG):
    """Fits all heads; stops after some passes."""
    register()
    model = build("gqa")
    rng = np.random.default_rng(1)
    prompts = [
        (kind, rng.integers(3, 64, length).tolist())
        for both in zip(*LENGTHS.values(), strict=True)
        for kind, length in zip(LENGTHS, both, strict=True)
    ]
    count = itertools.count(1)
    reporter = Reporter(stop=lambda: next(count) == after)
    inputs = FitInputs(
        model=model,
        shape=model_shape(model.config),
        config=config,
        patterns=[Pattern("none", partial(window, 0)), Pattern("window", partial(window, 20))],
        store=FitStore(folder),
        work=Work(reporter, 1),
        memory=2**24,
    )
    folder.mkdir(exist_ok=True)
    return fit_modes(inputs, prompts), next(count) - 1


@pytest.mark.parametrize("share", [0.05, 0.15, 0.25, 0.35, 0.6, 0.97])
def test_a_stopped_fit_goes_on_to_the_same_masks(tmp_path, share):
    whole, passes = fit(tmp_path / "whole")
    with pytest.raises(CalibrationStopped):
        fit(tmp_path / "parts", max(1, int(share * passes)))
    resumed, _ = fit(tmp_path / "parts")
    for name in ("columns", "diagonals", "true_bits", "modes"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    for name, array in vars(whole.dynamic).items():
        np.testing.assert_array_equal(getattr(resumed.dynamic, name), array)
    assert json.dumps(resumed.header.parameters) == json.dumps(whole.header.parameters)


def test_the_file_tells_what_was_fitted(tmp_path):
    masks, _ = fit(tmp_path)
    told = masks.header.parameters["fit"]
    assert told["chosen"] == told["proven"][0]
    assert (told["page"], told["platform"]) == (16, "cpu")
    assert told["chosen"]["loss"] == min(each["loss"] for each in told["proven"])
    assert len(told["curves"]) == len(TRUSTS)
    # A model this small has no two numbers of anchors to propose.
    assert len(told["proven"]) == len(TRUSTS) + (ASSIGNMENTS - 1) * TRUSTS_KEPT
    assert told["chosen"]["density"] <= CONFIG.target_density
    assert set(told["check"]) == set(LENGTHS)
    assert sorted(length for _, length, _ in told["texts"]) == sorted(sum(LENGTHS.values(), ()))
    modes = [[head.split()[0] for head in layer] for layer in told["heads"]]
    assert modes == [[HeadMode(mode).name.lower() for mode in layer] for layer in masks.modes]


def test_few_heads_keep_all_their_pages(tmp_path):
    config = CONFIG.model_copy(update={"target_kv_memory": 0.4})
    free, _ = fit(tmp_path)
    bound, _ = fit(tmp_path, config=config)
    assert (free.modes != HeadMode.STATIC).mean() > 0.4
    assert (bound.modes != HeadMode.STATIC).mean() <= 0.4
    assert bound.header.parameters["fit"]["target_kv_memory"] == 0.4
