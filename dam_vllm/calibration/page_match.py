"""Kept columns and diagonals beyond the PCL, from maps of pages.

What is looked for is what token maps of that length would show: a key, or a distance, whose
mean attention reaches tau. A page's mass does not tell whether one key or all of them draw it,
so the strongest reading is taken: all that a page holds beyond the row's usual page goes to one
key. With m the page's mass and b the median mass of the row's pages,

    peak = m - b (page - 1) / page.

A key that stands out keeps its page then, however weak the other keys are, while a row that is
spread evenly is left out as it is by token maps (where the mass itself would keep all of its
pages up to 1 / mean attention of tau pages: 12800 tokens for tau 0.1 and pages of 32). Peaks are
amplified with the token maps' statistics, so that tau means the same on both sides of the PCL.

A diagonal of tokens at distance r = d page + o, 0 <= o < page, lies in the page pairs at
distances d and d + 1, with shares (page - o) / page and o / page of its peak: the two together
are compared with tau. The share of d is never less than 1 / page of both, so what exceeds this
at d + 1 belongs to another diagonal.

A kept column of pages stands for all of its tokens, a kept d for the distances d page to
(d + 1) page - 1. Served with pages of the same size, these read the page pairs at d and d + 1.
"""

import numpy as np
import torch

from dam_vllm.calibration.amplify import Statistics, amplify
from dam_vllm.calibration.config import Amplification
from dam_vllm.calibration.match import Patterns, diagonal_sums, matched, true_mask


def peaks(mean: torch.Tensor, page: int) -> torch.Tensor:
    """The most attention that a key of each page may draw, given the usual page of its row.

    Args:
        mean: mean map of pages, float32 [heads, pages, pages].
        page: tokens a page.

    Returns:
        float32 [heads, pages, pages], 0 above the diagonal.
    """
    future = torch.ones(mean.shape[1:], dtype=torch.bool, device=mean.device).triu(1)
    usual = mean.masked_fill(future, float("nan")).nanmedian(dim=-1, keepdim=True).values
    return (mean - usual * ((page - 1) / page)).clamp_(min=0).tril_()


def match_pages(
    peak: torch.Tensor,
    windows: np.ndarray,
    page: int,
    statistics: Statistics,
    amplification: Amplification,
    tau: float,
    mu: float,
    min_support: int,
) -> Patterns:
    """Matches columns and diagonals of pages, query pages after the pattern's own key page only.

    Args:
        peak: of `peaks`, float32 [heads, pages, pages].
        windows: float64 [pages], windows that hold a query of each page.
        page: tokens a page.
        statistics: of the token maps.
        amplification: how peaks are amplified.
        tau: threshold of an amplified peak.
        mu: lowest share of a kept pattern's query pages.
        min_support: fewest query pages of a kept pattern.

    Returns:
        The kept patterns in tokens: bool [heads, pages * page] each.
    """
    # Row q and column k of both stand for query page q + 1: its mass on key page k, and on k + 1
    # together with k, which is distance (q + 1) - (k + 1) and the one after it.
    column = peak[:, 1:, :-1]
    near = peak[:, 1:, 1:]
    diagonal = near + torch.minimum(column, near * (page - 1))
    columns, diagonals = (
        true_mask(amplify(cells, windows[1:], statistics, amplification), tau)
        for cells in (column, diagonal)
    )
    return Patterns(
        _tokens(matched(columns.sum(dim=-2), mu, min_support), page),
        _tokens(matched(diagonal_sums(diagonals), mu, min_support), page),
    )


def _tokens(kept: torch.Tensor, page: int) -> torch.Tensor:
    """Pages [heads, pages - 1] to tokens [heads, pages * page]; the last page has no pattern."""
    last = torch.zeros_like(kept[:, :1])
    return torch.cat((kept, last), dim=-1).repeat_interleave(page, dim=-1)
