"""What bounds the fit: candidates that readers are measured under, and memory."""

from types import SimpleNamespace

import numpy as np
import pytest

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.candidates import Candidate
from dam_vllm.calibration.fit.followers import worth_trying
from dam_vllm.calibration.fit.inputs import FitInputs, proof_rows
from dam_vllm.calibration.fit.losses import Sums
from dam_vllm.calibration.settings import FitConfig
from dam_vllm.masks.budget import TopK

STRATA = ["kv/context/512", "kv/question/512", "kv/reply/512"]
CANDIDATES = [Candidate(0), *(Candidate(0, 8, TopK(count, 0, count)) for count in range(12))]


def test_readers_are_tried_under_what_nothing_beats(rng):
    """Static candidates are no anchor's, and beat nothing."""
    sums = Sums.empty(STRATA, 2, 2, len(CANDIDATES))
    sums.error[:] = rng.integers(1, 4, sums.error.shape)
    sums.norm[:] = 10.0
    costs = rng.integers(1, 4, (2, 2, len(CANDIDATES))).astype(float)
    sums.error[..., 0], costs[..., 0] = 0.0, 0.0
    tried = worth_trying(sums, costs, CANDIDATES, 99)
    for layer, head in np.ndindex(2, 2):
        error = sums.error[0, layer, :, head]
        measures = [
            (costs[layer, head, index], *error[:, index]) for index in range(len(CANDIDATES))
        ]
        for index, mine in enumerate(measures):
            beaten = any(
                all(b <= a for a, b in zip(mine, other, strict=True)) and other != mine
                for other in measures[1:]
            )
            assert tried[layer, head, index] == (index > 0 and not beaten)


def test_they_are_spread_over_cost_where_there_are_many():
    sums = Sums.empty(STRATA, 1, 1, len(CANDIDATES))
    costs = np.arange(13.0)[None, None]
    sums.error[:] = 20.0 - np.arange(13.0)
    sums.norm[:] = 1.0
    tried = worth_trying(sums, costs, CANDIDATES, 4)
    assert tried[0, 0].nonzero()[0].tolist() == [1, 5, 8, 12]


def test_query_blocks_at_once_follow_the_memory():
    """A row of a page: mass times values, and weights and scores of its tokens; and of spans."""
    shape = SimpleNamespace(heads=8, kv_heads=2)
    config = FitConfig(target_density=0.1, page=16)
    one = 16 * 4 * (65 * (32 + 3 * 16) + 8 * 32) * 4
    for memory, expected in ((one, 1), (3 * one - 1, 2), (10 * one, 10)):
        inputs = FitInputs(None, shape, config, [], None, None, memory)
        assert inputs.query_blocks_at_once(1024, 32) == expected
    little = FitInputs(None, shape, config, [], None, None, one - 1)
    with pytest.raises(CalibrationError, match=r"--memory-gib is .* for texts of 1024 tokens"):
        little.query_blocks_at_once(1024, 32)


def test_the_longest_questions_and_all_plain_texts_prove():
    config = FitConfig(target_density=0.1, lengths=[256, 1024])
    sizes = [("plain", 300), ("kv", 250), ("kv", 1000), ("lines", 1020), ("kv", 1001),
             ("plain", 900), ("kv", 1002), ("lines", 910)]  # fmt: skip
    assert sorted(proof_rows(sizes, config)) == [0, 2, 3, 4, 5]
