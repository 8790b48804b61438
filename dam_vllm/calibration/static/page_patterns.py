"""Kept columns and diagonals beyond the PCL, from maps of pages.

What is looked for is what token maps of that length would show: a key, or a distance, whose
mean attention reaches tau. A page's mass does not tell whether one key or all of them draw it,
so the strongest reading is taken: all that a page holds beyond the row's usual page goes to one
key. With m the page's mass and b the median mass of the row's pages,

    excess = max(m - b, 0),    peak = excess + min(m, b) / page.

A key that stands out keeps its page then, however weak the other keys are, while a row that is
spread evenly is left out as it is by token maps (where the mass itself would keep all of its
pages up to page / mean attention of tau tokens: 12800 for tau 0.1 and pages of 32). Peaks are
amplified with the token maps' statistics, so that tau means the same on both sides of the PCL.

A diagonal of tokens at distance r = d page + o, 0 <= o < page, lies in the page pairs at
distances d and d + 1, which share its excess as page - o to o. So a page counts together with
the stronger of its neighbours in the row, unless its own share is less than half of the least
that a diagonal gives it, 1 / page: then the neighbour holds a diagonal alone.

A kept column of pages stands for all of its tokens. A kept distance of pages stands for the
distances of tokens that lie in kept distances of pages altogether. Served with pages of the
same size, both read exactly the page pairs that were kept.
"""

import numpy as np
import torch
from torch.nn import functional as F

from dam_vllm.calibration.settings import Amplification
from dam_vllm.calibration.static.amplify import Statistics, amplify
from dam_vllm.calibration.static.patterns import Patterns, diagonal_sums, matched, true_mask


def split_mass(mean: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits each page's mass into what stands out of its row and what a key has anyway.

    Args:
        mean: mean map of pages, float32 [heads, pages, pages].
        page: tokens a page.

    Returns:
        The excess over the row's median page and the usual attention of one key, float32
        [heads, pages, pages] each, 0 above the diagonal.
    """
    future = torch.ones(mean.shape[1:], dtype=torch.bool, device=mean.device).triu(1)
    usual = mean.masked_fill(future, float("nan")).nanmedian(dim=-1, keepdim=True).values
    return (mean - usual).clamp_(min=0), torch.minimum(mean, usual).div_(page)


def match_pages(
    mean: torch.Tensor,
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
        mean: mean map of pages, float32 [heads, pages, pages].
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
    excess, usual = split_mass(mean, page)
    before, after = F.pad(excess, (1, -1)), F.pad(excess, (-1, 1))
    beside = torch.maximum(before, after)
    beside = torch.where(2 * page * excess >= excess + beside, beside, 0)
    cells = (excess + usual, excess + beside + usual)
    # Row q and column k of the cut maps stand for query page q + 1: a triangle whose first
    # diagonal is distance 1.
    columns, diagonals = (
        true_mask(amplify(cell[:, 1:, :-1], windows[1:], statistics, amplification), tau)
        for cell in cells
    )
    column = matched(columns.sum(dim=-2), mu, min_support)
    distance = matched(diagonal_sums(diagonals), mu, min_support)
    none, own = torch.zeros_like(column[:, :1]), torch.ones_like(column[:, :1])
    lower, upper = torch.cat((own, distance), dim=-1), torch.cat((distance, none), dim=-1)
    tokens = (lower & upper).repeat_interleave(page, dim=-1)
    tokens[:, ::page] = lower
    return Patterns(torch.cat((column, none), dim=-1).repeat_interleave(page, dim=-1), tokens)
