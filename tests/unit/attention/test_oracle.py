import pytest
import torch
import torch.nn.functional as F

from dam_vllm.attention.oracle import exact_mask, masked_attention, page_mask
from dam_vllm.masks.rule import token_mask


def test_equals_torch_under_the_same_mask(rng):
    torch.manual_seed(int(rng.integers(2**31)))
    query, key, value = torch.randn(63, 6, 40), torch.randn(111, 2, 40), torch.randn(111, 2, 40)
    mask = torch.rand(6, 63, 111) < 0.3
    mask[:, :, 0] = True
    expected = F.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.repeat_interleave(3, 1).transpose(0, 1),
        value.repeat_interleave(3, 1).transpose(0, 1),
        attn_mask=mask,
        scale=0.2,
    )
    result = masked_attention(query, key, value, mask, 0.2)
    torch.testing.assert_close(result, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_softcap_bounds_the_scores():
    query, key = torch.full((1, 1, 1), 50.0), torch.tensor([1.0, -1.0]).view(2, 1, 1)
    value = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    result = masked_attention(query, key, value, mask, 1.0, softcap=0.5)
    assert result.item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=1e-5)


def test_page_mask_only_adds_keys(random_masks):
    masks = random_masks(dense=True)
    for start, stop in ((0, 90), (55, 301), (300, 301)):
        exact = exact_mask(masks, 0, start, stop, 16)
        assert (page_mask(masks, 0, start, stop, 16) | ~exact).all()


def test_page_mask_does_not_depend_on_the_chunk(random_masks):
    masks = random_masks(share=0.005)
    whole = page_mask(masks, 1, 0, 400, 32, dense_below=100)
    for start, stop in ((0, 57), (57, 300), (300, 400)):
        part = page_mask(masks, 1, start, stop, 32, dense_below=100)
        assert (part == whole[:, start:stop, :stop]).all()


def test_exact_mask_is_the_rule_below_dense_ones(random_masks):
    masks = random_masks(dense=True)
    mask = exact_mask(masks, 0, 0, 320, 48, dense_below=20)
    rule = token_mask(masks, 0, 0, 320)
    assert (mask[2:, 144:] == rule[2:, 144:]).all()
    assert mask[:2, 319].all()
    assert mask[:, 143, :144].all()
    assert not mask[:, 143, 144:].any()
