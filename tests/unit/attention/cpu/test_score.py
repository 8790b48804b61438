"""Page scores against plain products."""

import pytest
import torch

from dam_vllm.attention.cpu.score import max_scores_of_span


@pytest.mark.parametrize(
    ("rows", "pages", "channels", "page"),
    [(1, 1, 1, 4), (24, 3, 16, 16), (25, 7, 5, 48), (1013, 61, 16, 32), (331, 9, 33, 128)],
)
def test_largest_score_of_each_page(rng, rows, pages, channels, page):
    torch.manual_seed(int(rng.integers(2**31)))
    query, keys = torch.randn(rows, channels), torch.randn(pages, channels, page)
    found = max_scores_of_span(query, keys)
    expected = torch.matmul(query[None].double(), keys.double()).amax(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
