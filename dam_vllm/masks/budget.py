"""What dynamic heads need: a basis to score tokens in, and how many pages to choose."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from dam_vllm.masks.rounding import ceil_div

IntArray = npt.NDArray[np.int32]


class BudgetKind(IntEnum):
    """What a budget counts, beyond the pages that a head reads anyway."""

    TOP_K = 0
    """A number of tokens, rounded up to pages."""
    SHARE = 1
    """A share of the tokens up to the query."""
    TOP_P = 2
    """Pages until every query's estimated attention mass reaches the budget, pages that the
    head reads anyway included."""


@dataclass(frozen=True)
class Dynamic:
    """Bases and budgets of dynamic heads; rows of heads of another mode say nothing.

    Attributes:
        rotations: float32 [layers, kv_heads, head_size, head_size], orthogonal; column c is the
            direction of the keys' c-th largest variance on calibration texts (Loki, arXiv
            2406.02542). Queries and keys are multiplied by it from the right.
        channels: int32 [layers, kv_heads], leading channels that score a token.
        kinds: uint8 [layers, kv_heads], a `BudgetKind` each.
        budgets: float32 [layers, kv_heads], in the unit that the kind tells.
        floors: int32 [layers, kv_heads], fewest tokens chosen, rounded up to pages.
        caps: int32 [layers, kv_heads], most tokens chosen, rounded up to pages.
        expected: float32 [layers, kv_heads], share of the context that TOP_P chose beyond static
            pages when it was measured; 0 for the other kinds, whose share follows.
    """

    rotations: npt.NDArray[np.float32]
    channels: IntArray
    kinds: npt.NDArray[np.uint8]
    budgets: npt.NDArray[np.float32]
    floors: IntArray
    caps: IntArray
    expected: npt.NDArray[np.float32]

    def check(self, layers: int, kv_heads: int) -> None:
        """Checks shapes and ranges.

        Raises:
            ValueError: for an array of another shape, or a value that means nothing.
        """
        size = self.rotations.shape[-1]
        for name in vars(self):
            shape: tuple[int, ...] = (layers, kv_heads)
            if name == "rotations":
                shape += (size, size)
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"dynamic {name} has shape {found}, expected {shape}")
        bounds = {
            "channels": (1, size),
            "kinds": (0, max(BudgetKind)),
            "budgets": (0, np.inf),
            "floors": (0, np.inf),
            "caps": (0, np.inf),
            "expected": (0, 1),
        }
        for name, (low, high) in bounds.items():
            values = getattr(self, name)
            if not ((values >= low) & (values <= high)).all():
                raise ValueError(f"dynamic {name} must lie between {low} and {high}")

    def chosen(self, layer: int, head: int, page: int, causal: np.ndarray) -> np.ndarray:
        """Pages that a head is expected to choose.

        Args:
            layer: global layer index.
            head: KV head.
            page: tokens a page.
            causal: int [n], pages up to and including each query's own.

        Returns:
            int [n], not yet bounded by how many pages there are.
        """
        at = (layer, head)
        budget = float(self.budgets[at])
        if self.kinds[at] == BudgetKind.TOP_K:
            count = np.full(causal.shape, np.ceil(budget / page))
        else:
            share = budget if self.kinds[at] == BudgetKind.SHARE else float(self.expected[at])
            count = np.ceil(share * causal - 1e-6)
        return np.clip(
            count, ceil_div(self.floors[at], page), ceil_div(self.caps[at], page)
        ).astype(int)


SUM_BLOCK = 64


@dataclass(frozen=True)
class Budget:
    """How many pages a KV head chooses, see `dam_vllm.masks.budget.Dynamic`.

    Attributes:
        kind: what `value` counts.
        value: pages (TOP_K), a share of the causal pages (SHARE), or attention mass (TOP_P).
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
        if kind == BudgetKind.TOP_K:
            value = float(np.ceil(value / page))
        floor, cap = (ceil_div(int(bound[at]), page) for bound in (dynamic.floors, dynamic.caps))
        return cls(kind, value, floor, max(floor, cap))


@dataclass(frozen=True)
class PageScores:
    """A head's scores for some query blocks.

    Attributes:
        logits: float32 [pages, query_blocks, rows], largest logit (scaled, capped) of each page;
            -inf for pages that a row may not see.
        present: bool [query_blocks, rows], rows that hold a query of this step, or None for all.
        own: int64 [query_blocks], the query block's own page, the last one it may see.
    """

    logits: torch.Tensor
    present: torch.Tensor | None
    own: torch.Tensor

    def mass(self) -> torch.Tensor:
        """Estimated share of each row's attention mass in each page, 0 for absent rows.

        A page's mass is estimated by its largest logit alone, which costs no further pass over
        tokens.

        Returns:
            float32 [pages, query_blocks, rows].
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
        static: bool [query_blocks, pages], pages that are read anyway, own pages included.
        budget: of the head.

    Returns:
        bool [query_blocks, pages], disjoint from `static`.
    """
    mass = scores.mass()
    ranking = mass.amax(dim=2).t()
    if budget.kind == BudgetKind.TOP_P:
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
    """Fewest pages beyond the static ones with which every row reaches a mass, int64 [blocks]."""
    order = ranking.masked_fill(static, 2.0).argsort(dim=1, descending=True, stable=True)
    ordered = mass.gather(0, order.t()[..., None].expand_as(mass))
    reached = ordered.cumsum(dim=0)
    # A row's shares add up to 1 but for rounding; absent rows have none and want nothing.
    short = (reached - ordered < wanted - 1e-6) & (reached[-1] > 0.0)
    return (short.any(dim=2).sum(dim=0) - static.sum(dim=1)).clamp_min(0)
