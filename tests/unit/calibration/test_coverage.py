import numpy as np
import pytest
import torch

from dam_vllm.calibration.static.coverage import Coverage
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.mask_set import Header, MaskSet, pack_lower
from dam_vllm.masks.rule import token_mask

LAYERS, HEADS, PCL = 2, 3, 13


@pytest.fixture(params=[None, 21, 40])
def masks(request):
    rng = np.random.default_rng(0)
    reach = request.param or PCL
    return MaskSet(
        columns=rng.random((LAYERS, HEADS, reach)) < 0.3,
        diagonals=rng.random((LAYERS, HEADS, reach)) < 0.3,
        true_bits=pack_lower(np.tril(rng.random((LAYERS, HEADS, PCL, PCL)) < 0.4)),
        modes=np.zeros((LAYERS, 1), dtype=np.uint8),
        header=Header(
            kind="calibrated",
            model="m",
            fingerprint=Fingerprint(config="0"),
            layer_types=["full"] * LAYERS,
            pcl=PCL,
            reach=request.param,
        ),
    )


def weights(length, seed):
    scores = torch.randn(HEADS, length, length, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def test_coverage_equals_a_naive_computation(masks):
    lengths = [29, 8, 20]
    maps = [weights(max(lengths), seed) for seed in range(3)]
    coverage = Coverage(masks)
    coverage.start_batch(lengths)
    for start, stop in ((0, 10), (10, 17), (17, 29)):  # blocks across the PCL
        block = torch.stack(maps)[:, :, start:stop, :stop]
        coverage.observe(1, start, block)
    near, far = coverage.result()
    seen = token_mask(masks, 1, 0, max(lengths))
    rows = [[], []]
    for map_, length in zip(maps, lengths, strict=True):
        kept = (map_.numpy() * seen).sum(-1)
        rows[0].append(kept[:, : min(length, PCL)])
        rows[1].append(kept[:, PCL:length])
    np.testing.assert_allclose(near[1], np.concatenate(rows[0], 1).mean(1), rtol=1e-5)
    np.testing.assert_allclose(far[1], np.concatenate(rows[1], 1).mean(1), rtol=1e-5)
    assert np.isnan(near[0]).all()


def test_rows_that_no_text_reaches_are_nan(masks):
    coverage = Coverage(masks)
    coverage.start_batch([PCL])
    coverage.observe(0, 0, weights(PCL, 0)[None])
    near, far = coverage.result()
    assert np.isfinite(near[0]).all()
    assert np.isnan(far).all()
