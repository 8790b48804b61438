"""A short run of `tests.soak`: static masks, whose answers are those of a request alone."""

import asyncio

import pytest

from tests.soak.load import save_static, serve, soak

pytestmark = pytest.mark.e2e

GROWTH = 100  # MiB


def test_bursts_past_capacity_change_no_answer(tmp_path, rng):
    masks = tmp_path / "masks"
    save_static(masks, rng)
    with serve(masks, kv_free="off") as server:
        report = asyncio.run(soak(server, rng, requests=10, bursts=4))
    print(report)
    assert report["lost"] == report["other tokens"] == report["other log-probabilities"] == 0
    assert report["asked"] > report["streamed"] > 0
    assert report["preempted"] > 0
    assert report["found in the prefix cache"] > 0
    assert report["pages in use at the end"] == 0
    assert report["MiB"][-1] < report["MiB"][0] + GROWTH
