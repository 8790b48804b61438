"""Copies head by head against indexing."""

import pytest
import torch

from dam_vllm.attention.cuda.flash import gather_heads, scatter_heads


@pytest.mark.parametrize("tokens", [1, 17, 100])
@pytest.mark.parametrize("size", [64, 40])
def test_copies_equal_indexing(rng, device, tokens, size):
    torch.manual_seed(int(rng.integers(2**31)))
    heads = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
    # A fused projection: queries of 12 heads, then what else there is.
    fused = torch.randn(tokens, 20 * size, device=device).half()
    query = fused[:, : 12 * size].view(tokens, 12, size)
    by_head = query.unflatten(1, (4, 3)).transpose(0, 1)
    poison = torch.full((3 * tokens + 5, 3, size), torch.nan, device=device).half()
    gathered = poison[: 3 * tokens].view(3, tokens, 3, size)
    gather_heads(query, heads, gathered)
    assert torch.equal(gathered, by_head[heads.long()])
    assert poison[3 * tokens :].isnan().all()
    output = torch.full((tokens + 2, 12, size), torch.nan, device=device).half()
    scatter_heads(gathered, heads, output[:tokens])
    wanted = torch.full_like(output, torch.nan)
    wanted[:tokens].unflatten(1, (4, 3)).transpose(0, 1)[heads.long()] = by_head[heads.long()]
    torch.testing.assert_close(output, wanted, rtol=0, atol=0, equal_nan=True)
