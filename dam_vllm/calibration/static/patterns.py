"""True mask and kept patterns of one layer's amplified map (paper, Stage 1).

The pattern pool is every vertical (j = c, i >= c) and every diagonal (i - j = r). A pattern's
score is the share of its cells that the true mask holds. Patterns are never built: column
sums score all verticals, and sums over a skewed view of the mask score all diagonals.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Patterns:
    """Kept patterns of one layer.

    Attributes:
        columns: bool [heads, n], kept key positions c.
        diagonals: bool [heads, n], kept distances r.
    """

    columns: torch.Tensor
    diagonals: torch.Tensor

    def extended(self, further: "Patterns") -> "Patterns":
        """These patterns, followed by those of the positions and distances after them."""
        return Patterns(
            torch.cat((self.columns, further.columns), dim=-1),
            torch.cat((self.diagonals, further.diagonals), dim=-1),
        )


def true_mask(amplified: torch.Tensor, tau: float) -> torch.Tensor:
    """Keeps the valid pairs that reach the threshold.

    Args:
        amplified: float32 [heads, pcl, pcl].
        tau: threshold.

    Returns:
        bool [heads, pcl, pcl], False above the diagonal.
    """
    return (amplified >= tau).tril_()


def match(mask: torch.Tensor, mu: float, min_support: int) -> Patterns:
    """Scores all verticals and diagonals and keeps those that match.

    Vertical c and diagonal r have pcl - c and pcl - r cells. The last ones have so few that
    noise matches them by chance, and extended they would be wrong at any length; so a pattern
    needs a minimum support (this project's addition to the paper).

    Args:
        mask: true mask, bool [heads, pcl, pcl], False above the diagonal.
        mu: lowest score of a kept pattern.
        min_support: fewest cells of a kept pattern.

    Returns:
        The kept patterns.
    """
    return Patterns(
        matched(mask.sum(dim=-2), mu, min_support), matched(diagonal_sums(mask), mu, min_support)
    )


def matched(hits: torch.Tensor, mu: float, min_support: int) -> torch.Tensor:
    """Which patterns of a triangle match.

    Args:
        hits: int64 [heads, n], cells of each pattern that the true mask holds; the k-th pattern
            has n - k cells.
        mu: lowest share of a kept pattern.
        min_support: fewest cells of a kept pattern.

    Returns:
        bool [heads, n].
    """
    cells = torch.arange(hits.shape[-1], 0, -1, device=hits.device)
    return (hits.double() / cells >= mu) & (cells >= min_support)


def diagonal_sums(mask: torch.Tensor) -> torch.Tensor:
    """Sums along every diagonal i - j = r.

    With pcl - 1 zeros in front of the flattened mask, row i of a view that moves on by pcl + 1
    holds (i, i - pcl + 1) .. (i, i): what wraps into the row before lies above its diagonal,
    where the mask is False.

    Args:
        mask: bool [heads, pcl, pcl], False above the diagonal.

    Returns:
        int64 [heads, pcl], by r.
    """
    heads, pcl, _ = mask.shape
    flat = F.pad(mask.flatten(1), (pcl - 1, 0))
    skewed = flat.as_strided((heads, pcl, pcl), (flat.shape[1], pcl + 1, 1))
    return skewed.sum(dim=1).flip(-1)
