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


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_tail_is_spans_means_as_often_as_they_have_tokens(rng, softcap):
    """Written as attention over copies: each key and value of an unread span is its mean."""
    torch.manual_seed(int(rng.integers(2**31)))
    page, tokens, new = 48, 500, 90  # spans of 144 tokens
    query, key = torch.randn(new, 4, 8) * 2, torch.randn(tokens, 2, 8)
    value = torch.randn(tokens, 2, 8)
    read = torch.rand(4, 11) < 0.2
    read[:, [0, 8, 9, 10]] = True
    read[:, 1:3] = False
    read[2:, 3:6] = False
    causal = torch.arange(tokens) <= torch.arange(tokens - new, tokens)[:, None]
    mask = read.repeat_interleave(page, dim=1)[:, None, :tokens] & causal
    found = masked_attention(query, key, value, mask, 0.3, softcap, [1], page)
    expected = masked_attention(query, key, value, mask, 0.3, softcap)
    for head in (2, 3):
        for row in range(new):
            own, seen = (tokens - new + row) // page * page, mask[head, row].clone()
            keys, values = key[:, 1:].clone(), value[:, 1:].clone()
            for start in range(0, own - 143, 144):
                span = slice(start, start + 144)
                if not seen[span].any():
                    keys[span], values[span] = keys[span].mean(0), values[span].mean(0)
                    seen[span] = True
            expected[row, head] = masked_attention(
                query[row : row + 1, head : head + 1], keys, values, seen[None, None], 0.3, softcap
            )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = masked_attention(query, key, value, mask, 0.3, softcap)
    assert (found[:, 2:] - plain[:, 2:]).abs().max() > 0.01


def test_a_tail_knows_nothing_of_later_tokens(rng):
    torch.manual_seed(int(rng.integers(2**31)))
    page, tokens, new = 16, 500, 300
    query, key, value = torch.randn(new, 2, 8), torch.randn(tokens, 1, 8), torch.randn(tokens, 1, 8)
    position = torch.arange(tokens - new, tokens)
    mask = (torch.arange(tokens) // page == (position // page)[:, None]).expand(2, -1, -1)
    mask = mask & (torch.arange(tokens) <= position[:, None])
    found = masked_attention(query, key, value, mask, 0.3, tails=[0], page=page)
    for row in rng.choice(new, 9):
        stop = int(position[row]) + 1
        alone = masked_attention(
            query[row : row + 1], key[:stop], value[:stop], mask[:, row : row + 1, :stop], 0.3,
            tails=[0], page=page,
        )  # fmt: skip
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)
