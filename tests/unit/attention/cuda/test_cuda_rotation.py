"""The rotation's kernel against the plain product."""

import pytest
import torch

from dam_vllm.attention.cuda.rotation import DeviceRotation, quantise
from tests.unit.attention.cuda.launches import Launches


@pytest.fixture
def rotation(rng, device):
    def make(size, heads):
        torch.manual_seed(int(rng.integers(2**31)))
        bases = torch.linalg.qr(torch.randn(len(heads), size, size))[0].contiguous()
        return DeviceRotation(torch.tensor(heads, device=device), bases.to(device))

    return make


@pytest.mark.parametrize("tokens", [1, 37, 96])
@pytest.mark.parametrize(
    ("size", "dtype", "error"),
    [(64, torch.float32, 1e-5), (40, torch.float16, 2e-3), (128, torch.bfloat16, 2e-2)],
)
def test_rotation_equals_the_product(rotation, device, tokens, size, dtype, error):
    made = rotation(size, [2, 0])
    # A fused projection: queries of 6 heads, keys, values.
    fused = torch.randn(tokens, 12 * size).to(dtype).to(device)
    query = fused[:, : 6 * size].view(tokens, 6, size)
    found = made.queries(query, 3)
    assert found.shape == query.shape
    for head in range(6):
        wanted = query[:, head]
        if head // 2 != 1:
            basis = made.rotations[0 if head // 2 == 2 else 1]
            wanted = (wanted.double() @ basis.double()).to(dtype)
            torch.testing.assert_close(found[:, head], wanted, rtol=error, atol=error)
        else:
            assert torch.equal(found[:, head], wanted)


def test_a_token_does_not_depend_on_the_others(rotation, device):
    """Bit for bit on a GPU; the product that interprets it may round by a row's place."""
    error = 0 if device.type == "cuda" else 1e-6
    made, query = rotation(64, [0, 1]), torch.randn(75, 4, 64).to(device)
    whole = made.queries(query, 2)
    for cut in (slice(0, 1), slice(33, 75), slice(74, 75)):
        found = made.queries(query[cut], 2)
        torch.testing.assert_close(found, whole[cut], rtol=error, atol=error)


def test_it_is_one_launch(rotation, device):
    made, query = rotation(64, [0]), torch.randn(5, 4, 64).to(device)
    made.queries(query, 2)
    with Launches() as launches:
        made.queries(query, 2)
    assert launches.all == ["_rotate"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_are_quantised_as_vllm_does(rotation, device, dtype):
    """Whether heads are rotated or not; what is too large becomes the largest number there is."""
    made, scale = rotation(64, [1]), torch.tensor(0.37, device=device)
    query = (torch.randn(37, 9, 64) * 50).to(dtype).to(device)[:, 1:7]
    assert query.float().abs().max() / scale > 448

    def wanted(vectors):
        divided = vectors.float() * scale.reciprocal()
        return divided.clamp(-448, 448).to(torch.float8_e4m3fn)

    plain, turned = quantise(query, scale), made.queries(query, 3, scale)
    assert plain.dtype == turned.dtype == torch.float8_e4m3fn
    assert plain.is_contiguous()
    assert torch.equal(plain.float(), wanted(query).float())
    assert torch.equal(turned[:, :2].float(), wanted(query[:, :2]).float())
    # The rotated head is quantised from float32, unrounded.
    exact = wanted(made.queries(query.float(), 3))[:, 2:4].float()
    torch.testing.assert_close(turned[:, 2:4].float(), exact, rtol=0.13, atol=2e-3)
    assert (turned[:, 2:4].float() == exact).float().mean() > 0.99


def test_quantising_is_one_launch(rotation, device):
    made, query = rotation(64, [0]), torch.randn(5, 4, 64).to(device)
    scale = torch.ones((), device=device)
    made.queries(query, 2, scale)
    with Launches() as launches:
        made.queries(query, 2, scale)
        quantise(query, scale)
    assert launches.all == ["_rotate"] * 2
