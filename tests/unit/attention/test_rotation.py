"""Rotation on CPU: against plain products, and what a token's result must not depend on."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.cpu.rotation import CPURotation
from dam_vllm.attention.rotation import HeadRotation

KV_HEADS, TOKENS = 5, 1411


@pytest.fixture(
    params=[(HeadRotation, 32), (HeadRotation, 80), (CPURotation, 32), (CPURotation, 128)],
    ids=lambda each: f"{each[0].__name__}-{each[1]}",
)
def rotation(request, rng):
    of, size = request.param
    bases = [np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2)]
    return of(torch.tensor([1, 4]), torch.from_numpy(np.stack(bases)).float())


def vectors(rng, tokens, heads, size, dtype):
    """Cut out of a fused projection, whose other parts are poisoned."""
    fused = torch.full((tokens, heads + 3, size), torch.nan, dtype=dtype)
    fused[:, 2:-1] = torch.from_numpy(rng.normal(size=(tokens, heads, size))).to(dtype)
    return fused[:, 2:-1]


@pytest.mark.parametrize("tokens", [1, 7, 33, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_heads_are_turned_and_others_left(rng, rotation, tokens, dtype):
    size, tolerance = rotation.rotations.shape[-1], 1e-5 if dtype == torch.float32 else 2e-2
    for heads_per_kv in (1, 3):
        given = vectors(rng, tokens, KV_HEADS * heads_per_kv, size, dtype)
        before = given.clone()
        found = rotation.keys(given) if heads_per_kv == 1 else rotation.queries(given, KV_HEADS)
        expected = given.double().unflatten(1, (KV_HEADS, heads_per_kv)).clone()
        for head, basis in zip([1, 4], rotation.rotations.double(), strict=True):
            expected[:, head] = expected[:, head] @ basis
        assert (found.dtype, found.is_contiguous()) == (dtype, True)
        torch.testing.assert_close(
            found.double(), expected.flatten(1, 2), rtol=tolerance, atol=tolerance
        )
        assert torch.equal(given, before)
        others = [0, 2, 3]
        assert torch.equal(
            found.unflatten(1, (KV_HEADS, -1))[:, others],
            given.unflatten(1, (KV_HEADS, -1))[:, others],
        )


def test_a_token_is_turned_as_it_is_alone(rng, rotation):
    """Bit for bit, wherever it lies in however many."""
    size = rotation.rotations.shape[-1]
    for heads_per_kv in (1, 2, 3):
        query = vectors(rng, TOKENS, KV_HEADS * heads_per_kv, size, torch.float32)
        whole = rotation.queries(query, KV_HEADS).clone()
        for cut in (slice(3, 4), slice(5, 15), slice(17, 60), slice(1000, TOKENS)):
            assert torch.equal(rotation.queries(query[cut], KV_HEADS), whole[cut])
