"""Which pages a dynamic head adds to its static ones, given page scores.

A page matters to a tile as much as to the query that needs it most: for every row the share of
its attention mass that each page holds is estimated, and a tile takes the largest over its rows.
So one query that looks far back gets its page, while rows that look at their own surroundings, or
everywhere a little, ask for nothing.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from dam_vllm.masks.dynamic import BudgetKind, Dynamic

SUM_BLOCK = 64


@dataclass(frozen=True)
class Budget:
    """How many pages a KV head chooses, see `dam_vllm.masks.dynamic.Dynamic`.

    Attributes:
        kind: what `value` counts.
        value: pages (COUNT), a share of the causal pages (SHARE), or attention mass (MASS).
        floor: fewest pages.
        cap: most pages.
    """

    kind: BudgetKind
    value: float
    floor: int
    cap: int

    @classmethod
    def of(cls, dynamic: Dynamic, layer: int, head: int, page: int) -> "Budget":
        """A KV head's budget, in pages of `page` tokens."""
        at = (layer, head)
        kind, value = BudgetKind(int(dynamic.kinds[at])), float(dynamic.budgets[at])
        if kind == BudgetKind.COUNT:
            value = float(-(-value // page))
        floor, cap = (-(-int(bound[at]) // page) for bound in (dynamic.floors, dynamic.caps))
        return cls(kind, value, floor, max(floor, cap))


@dataclass(frozen=True)
class PageScores:
    """A head's scores for some tiles.

    Attributes:
        logits: float32 [pages, tiles, rows], largest logit (scaled, capped) of each page; -inf
            for pages that a row may not see.
        present: bool [tiles, rows], rows that hold a query of this step, or None for all.
        own: int64 [tiles], the tile's own page, the last one it may see.
    """

    logits: torch.Tensor
    present: torch.Tensor | None
    own: torch.Tensor

    def mass(self) -> torch.Tensor:
        """Estimated share of each row's attention mass in each page, 0 for absent rows.

        A page's mass is estimated by its largest logit alone, which costs no further pass over
        tokens.

        Returns:
            float32 [pages, tiles, rows].
        """
        weights = (self.logits - self.logits.amax(dim=0)).exp_()
        weights /= _total(weights)
        return weights if self.present is None else weights.masked_fill_(~self.present, 0.0)


def _total(weights: torch.Tensor) -> torch.Tensor:
    """Sum over pages in blocks: zeros of longer requests in the batch change nothing."""
    pages, *rest = weights.shape
    padded = weights
    if pages % SUM_BLOCK:
        padded = pad(weights, (0, 0) * len(rest) + (0, -pages % SUM_BLOCK))
    return padded.view(-1, SUM_BLOCK, *rest).sum(dim=1).cumsum(dim=0)[-1]


def choose(scores: PageScores, static: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Chooses pages beyond the static ones; of equal ones all, of those without mass none.

    Args:
        scores: of the head.
        static: bool [tiles, pages], pages that are read anyway, own pages included.
        budget: of the head.

    Returns:
        bool [tiles, pages], disjoint from `static`.
    """
    mass = scores.mass()
    ranking = mass.amax(dim=2).t()
    if budget.kind == BudgetKind.MASS:
        count = _until_mass(mass, ranking, static, budget.value)
    elif budget.kind == BudgetKind.SHARE:
        count = torch.ceil(budget.value * (scores.own + 1) - 1e-6).long()
    else:
        count = torch.full_like(scores.own, int(budget.value))
    count = count.clamp(budget.floor, budget.cap)
    ranking = ranking.masked_fill(static, 0.0)
    most = min(max(1, int(count.max())), ranking.shape[1])
    ordered = ranking.topk(most, dim=1).values
    last = ordered.gather(1, (count - 1).clamp(0, most - 1)[:, None])
    return (ranking >= last) & (ranking > 0.0) & (count > 0)[:, None]


def _until_mass(
    mass: torch.Tensor, ranking: torch.Tensor, static: torch.Tensor, wanted: float
) -> torch.Tensor:
    """Fewest pages beyond the static ones with which every row reaches a mass, int64 [tiles]."""
    order = ranking.masked_fill(static, 2.0).argsort(dim=1, descending=True, stable=True)
    ordered = mass.gather(0, order.t()[..., None].expand_as(mass))
    reached = ordered.cumsum(dim=0)
    # A row's shares add up to 1 but for rounding; absent rows have none and want nothing.
    short = (reached - ordered < wanted - 1e-6) & (reached[-1] > 0.0)
    return (short.any(dim=2).sum(dim=0) - static.sum(dim=1)).clamp_min(0)
