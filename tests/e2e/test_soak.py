"""Short runs of `tests.soak`: answers under load are those of a request alone."""

import asyncio

import pytest

from dam_vllm.demo import model_dir
from dam_vllm.options import MASKS_IN_MODEL
from tests.soak.load import save_static, serve, soak

pytestmark = pytest.mark.e2e

GROWTH = 100  # MiB


def run(rng, masks, **options):
    """What a server told of some bursts; none was lost, and no page is in use."""
    with serve(masks, **options) as server:
        report = asyncio.run(soak(server, rng, requests=10, bursts=4))
    print(report)
    assert report["asked"] > report["streamed"] > 0
    assert report["found in the prefix cache"] > 0
    assert report["lost"] == report["pages in use at the end"] == 0
    return report


def test_bursts_past_capacity_change_no_answer(tmp_path, rng):
    masks = tmp_path / "masks"
    save_static(masks, rng)
    report = run(rng, masks, kv_free="off")
    assert report["other tokens"] == report["other log-probabilities"] == 0
    assert report["preempted"] > 0
    assert report["MiB"][-1] < report["MiB"][0] + GROWTH


def test_bursts_change_no_answer_of_heads_that_choose(rng):
    """But for rounding of dense heads, and generated tokens that are computed again.

    2 of 1547 in a longer run; chunks that ended inside pages changed nearly half.
    """
    report = run(rng, model_dir() / MASKS_IN_MODEL)
    assert report["other tokens"] + report["other log-probabilities"] <= 1
