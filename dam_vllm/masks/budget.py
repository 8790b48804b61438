"""How many pages a dynamic head chooses: one class a kind of budget.

A page matters to a query block as much as to the query that needs it most: for every row the share
of its attention mass that each page holds is estimated, and a query block takes the largest over
its rows. So one query that looks far back gets its page, while rows that look at their own
surroundings, or everywhere a little, ask for nothing.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch

MAX_TOKENS = 2**31 - 1
# Pages of the best that top-p adds up at a time: it ends where every row has enough.
TOP_P_STEP = 64


class BudgetKind(IntEnum):
    """What a budget counts, beyond the pages that a head reads anyway."""

    TOP_K = 0
    """A number of tokens, rounded up to pages."""
    SHARE = 1
    """A share of the tokens up to the query."""
    TOP_P = 2
    """Pages until every query's estimated attention mass reaches the budget, pages that the
    head reads anyway included."""


def page_mass(logits: torch.Tensor) -> torch.Tensor:
    """Estimated share of each row's attention mass in each page, by the page's largest logit alone.

    That costs no further pass over tokens. It is the softmax over pages, whose own rounding depends
    on how many rows there are and where among them a row stands; here pages are added up one after
    the other, so that a row's shares depend neither on the rest of the batch nor on how many pages
    follow.

    Args:
        logits: float32 [..., pages, rows], largest logit (scaled, capped) of each page; -inf for
            pages that a row may not see.
    """
    weights = (logits - logits.amax(dim=-2, keepdim=True)).exp_()
    return weights.div_(weights.cumsum(dim=-2)[..., -1:, :])


@dataclass(frozen=True)
class PageMasses:
    """What query blocks choose from; of a head, or of several one after the other.

    Attributes:
        mass: float32 [pages, query blocks, rows], as `page_mass` gives them; 0 for rows that hold
            no query of this step.
        largest: float32 [query blocks, pages], the largest mass over rows.
        static: bool [query blocks, pages], pages that are read anyway, own pages included.
        own: int64 [query blocks], the query block's own page, the last one it may see.
    """

    mass: torch.Tensor
    largest: torch.Tensor
    static: torch.Tensor
    own: torch.Tensor

    @classmethod
    def of(cls, mass: torch.Tensor, static: torch.Tensor, own: torch.Tensor) -> "PageMasses":
        """What there is to choose from, by mass."""
        return cls(mass, mass.amax(dim=2).t(), static, own)

    def take(self, some: slice) -> "PageMasses":
        """Some of the query blocks, of whole heads."""
        return PageMasses(self.mass[:, some], self.largest[some], self.static[some], self.own[some])

    def until(self, order: torch.Tensor, enough: torch.Tensor) -> torch.Tensor:
        """Pages in an order until every row of a query block has enough of its mass.

        Args:
            order: int64 [query blocks, n], pages.
            enough: float32 [query blocks].

        Returns:
            int64 [query blocks], n where they are not enough.
        """
        each = torch.arange(len(order), device=order.device)
        # Absent rows have no mass and want nothing.
        reached = torch.where(self.mass.amax(dim=0) > 0.0, 0.0, torch.inf)
        count = torch.zeros_like(each)
        for some in order.t().split(TOP_P_STEP):
            added = self.mass[some, each]
            before = added.cumsum(dim=0) - added + reached
            short = (before < enough[:, None]).any(dim=2)
            count += short.sum(dim=0)
            if not short[-1].any():
                break
            reached = before[-1] + added[-1]
        return count


@dataclass(frozen=True)
class Budget(ABC):
    """How many pages a KV head chooses beyond those that it reads anyway.

    Attributes:
        kind: what `value` counts, and how it is stored.
        measured: whether the share of the context that is chosen follows from texts alone.
        most: largest value that is stored.
        value: in the unit of the kind.
        floor: fewest pages.
        cap: most pages.
    """

    kind: ClassVar[BudgetKind]
    measured: ClassVar[bool] = False
    most: ClassVar[int] = 1
    value: float
    floor: int
    cap: int

    @classmethod
    @abstractmethod
    def wanted(cls, values: torch.Tensor, cap: int, pages: PageMasses) -> torch.Tensor:
        """Pages wanted before floor and cap; beyond the cap, any number that is no smaller.

        Args:
            values: float32 [query blocks], the value of each one's budget.
            cap: most pages that any of them may choose.
            pages: what the query blocks may choose from.

        Returns:
            int64 [query blocks].
        """

    @abstractmethod
    def expected_pages(self, causal: np.ndarray, share: float | np.ndarray) -> np.ndarray:
        """Pages expected for int [n] causal ones before floor and cap; see `expected`."""

    @staticmethod
    @abstractmethod
    def words(value: float) -> str:
        """A stored value in words, for reports."""

    @staticmethod
    def in_pages(value: float, page: int) -> float:
        """A stored value in the unit that choosing takes."""
        return value

    def in_tokens(self, page: int) -> float:
        """The value as it is stored, whatever the page size."""
        return self.value

    def expected(self, causal: np.ndarray, share: float | np.ndarray) -> np.ndarray:
        """Pages that are expected to be chosen.

        Args:
            causal: int [n], pages up to and including each query's own.
            share: measured share of the causal pages, where it was `measured`.

        Returns:
            float [..., n], not yet bounded by how many pages there are.
        """
        return np.clip(self.expected_pages(causal, share), self.floor, self.cap)


class TopK(Budget):
    """A number of pages."""

    kind = BudgetKind.TOP_K
    most = MAX_TOKENS

    @classmethod
    def wanted(cls, values: torch.Tensor, cap: int, pages: PageMasses) -> torch.Tensor:
        return values.long()

    def expected_pages(self, causal: np.ndarray, share: float | np.ndarray) -> np.ndarray:
        return np.full(causal.shape, self.value)

    @staticmethod
    def words(value: float) -> str:
        return f"{value:g} tokens"

    @staticmethod
    def in_pages(value: float, page: int) -> float:
        return float(np.ceil(value / page))

    def in_tokens(self, page: int) -> float:
        return self.value * page


class Share(Budget):
    """A share of the causal pages."""

    kind = BudgetKind.SHARE

    @classmethod
    def wanted(cls, values: torch.Tensor, cap: int, pages: PageMasses) -> torch.Tensor:
        return torch.ceil(values * (pages.own + 1) - 1e-6).long()

    def expected_pages(self, causal: np.ndarray, share: float | np.ndarray) -> np.ndarray:
        return np.asarray(np.ceil(self.value * causal - 1e-6))

    @staticmethod
    def words(value: float) -> str:
        return f"{value:g} of the context"


class TopP(Budget):
    """Fewest pages with which every row reaches a share of its attention mass."""

    kind = BudgetKind.TOP_P
    measured = True

    @classmethod
    def wanted(cls, values: torch.Tensor, cap: int, pages: PageMasses) -> torch.Tensor:
        read = pages.static.sum(dim=1)
        largest = pages.largest.masked_fill(pages.static, 2.0)
        order = largest.argsort(dim=1, descending=True, stable=True)
        # Where the cap ends it anyway, no further page needs to be added up. A row's shares add up
        # to 1 but for rounding.
        count = pages.until(order[:, : int(read.max()) + cap], values - 1e-6)
        return (count - read).clamp_min(0)

    def expected_pages(self, causal: np.ndarray, share: float | np.ndarray) -> np.ndarray:
        return np.asarray(np.ceil(share * causal - 1e-6))

    @staticmethod
    def words(value: float) -> str:
        return f"up to {value:g} of the mass"


BUDGETS: dict[BudgetKind, type[Budget]] = {each.kind: each for each in (TopK, Share, TopP)}


def choose(pages: PageMasses, budgets: Sequence[Budget]) -> torch.Tensor:
    """Chooses pages beyond the static ones; of equal ones all, of those without mass none.

    Args:
        pages: what there is to choose from.
        budgets: of each head.

    Returns:
        bool [query_blocks, pages], disjoint from `pages.static`.
    """
    count = _counts(pages, budgets)
    largest = pages.largest.masked_fill(pages.static, 0.0)
    most = min(max(1, int(count.max())), largest.shape[1])
    ordered = largest.topk(most, dim=1).values
    last = ordered.gather(1, (count - 1).clamp(0, most - 1)[:, None])
    return (largest >= last) & (largest > 0.0) & (count > 0)[:, None]


def _counts(pages: PageMasses, budgets: Sequence[Budget]) -> torch.Tensor:
    """Pages that each query block chooses, int64; neighbours of a kind are counted together."""
    found, first, each = [], 0, len(pages.own) // len(budgets)
    for _, group in groupby(budgets, type):
        alike = tuple(group)
        bounds = _bounds(alike, pages.own.device)
        values, floors, caps = bounds.repeat_interleave(each, dim=1).unbind()
        some = slice(first, first + len(values))
        wanted = alike[0].wanted(values, max(one.cap for one in alike), pages.take(some))
        found.append(wanted.clamp(floors.long(), caps.long()))
        first = some.stop
    return torch.cat(found)


@functools.lru_cache(maxsize=1024)
def _bounds(budgets: tuple[Budget, ...], device: torch.device) -> torch.Tensor:
    """Values, floors and caps, float32 [3, budgets]."""
    bounds = [(each.value, float(each.floor), float(each.cap)) for each in budgets]
    return torch.tensor(bounds, device=device).t().contiguous()
