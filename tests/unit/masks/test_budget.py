import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dam_vllm.masks.budget import (
    BUDGETS,
    BudgetKind,
    PageMasses,
    Share,
    TopK,
    TopP,
    choose,
    page_mass,
)

PAGES, BLOCKS, ROWS = 30, 6, 4


class Scores(NamedTuple):
    """Logits [pages, blocks, rows], and who asks."""

    logits: torch.Tensor
    present: torch.Tensor
    own: torch.Tensor

    def choose(self, static, budgets):
        mass = self.logits.softmax(dim=0).masked_fill(~self.present, 0.0)
        return choose(PageMasses.of(mass, static, self.own), budgets)


@pytest.fixture
def case(rng):
    """Scores of the last query blocks of 30 pages, some rows absent, and static pages."""
    own = torch.arange(PAGES - BLOCKS, PAGES)
    logits = torch.from_numpy(rng.normal(size=(PAGES, BLOCKS, ROWS)) * 2).float()
    logits[torch.arange(PAGES)[:, None] > own] = -torch.inf
    present = torch.from_numpy(rng.random((BLOCKS, ROWS)) < 0.7)
    present[:, 0] = True
    static = torch.from_numpy(rng.random((BLOCKS, PAGES)) < 0.1)
    static[torch.arange(BLOCKS), own] = True
    return Scores(logits, present, own), static & (torch.arange(PAGES) <= own[:, None])


def by_definition(scores, static, budget):
    """One query block after the other: the best pages until the budget is spent."""
    result = np.zeros(static.shape, dtype=bool)
    for block in range(BLOCKS):
        causal = int(scores.own[block]) + 1
        rows = scores.logits[:causal, block, scores.present[block]].double().softmax(dim=0).numpy()
        read = static[block, :causal].numpy()
        best = [page for page in np.argsort(-rows.max(axis=1)) if not read[page]]
        if budget.kind == BudgetKind.TOP_K:
            count = int(budget.value)
        elif budget.kind == BudgetKind.SHARE:
            count = math.ceil(round(budget.value * causal, 6))
        else:
            sums = [rows[read].sum(axis=0) + rows[best[:n]].sum(axis=0) for n in range(len(best))]
            enough = [n for n, mass in enumerate(sums) if (mass >= budget.value - 1e-6).all()]
            count = enough[0] if enough else len(best)
        result[block, best[: max(budget.floor, min(count, budget.cap))]] = True
    return result


@pytest.mark.parametrize(("floor", "cap"), [(0, 99), (3, 99), (0, 2), (5, 5)])
@pytest.mark.parametrize(
    ("kind", "value"),
    [(TopK, 0), (TopK, 4), (Share, 0.1), (Share, 0.31), (TopP, 0.3), (TopP, 0.9), (TopP, 1.0)],
)
def test_chosen_pages_are_the_best_within_the_budget(case, kind, value, floor, cap):
    budget, (scores, static) = kind(value, floor, cap), case
    found = scores.choose(static, [budget]).numpy()
    np.testing.assert_array_equal(found, by_definition(scores, static, budget))


@pytest.mark.parametrize(("value", "cap"), [(0.2, 999), (0.6, 999), (0.99, 999), (0.99, 70)])
def test_mass_is_added_up_over_many_pages(rng, value, cap):
    """More than are added up at a time; rows that need few and many, and absent ones."""
    pages = 331
    own = torch.arange(pages - BLOCKS, pages)
    spread = torch.from_numpy(rng.uniform(0.01, 4, size=(BLOCKS, ROWS)))
    logits = (torch.from_numpy(rng.normal(size=(pages, BLOCKS, ROWS))) * spread).float()
    logits[torch.arange(pages)[:, None] > own] = -torch.inf
    present = torch.from_numpy(rng.random((BLOCKS, ROWS)) < 0.7)
    present[:, 0] = True
    static = torch.from_numpy(rng.random((BLOCKS, pages)) < 0.05)
    static[torch.arange(BLOCKS), own] = True
    static &= torch.arange(pages) <= own[:, None]
    scores, budget = Scores(logits, present, own), TopP(value, 1, cap)
    found = scores.choose(static, [budget]).numpy()
    np.testing.assert_array_equal(found, by_definition(scores, static, budget))


@pytest.mark.parametrize("rows", [4, 8, 16, 24])
@pytest.mark.parametrize("count", [3, 99])
def test_mass_does_not_depend_on_the_batch(rng, count, rows):
    """Bit for bit, alone and beside longer requests, few or many, for few pages and many."""
    for pages in (5, 64, 65, 130, 199):
        logits = torch.full((count, 230, rows), -torch.inf)
        logits[0, :pages] = torch.from_numpy(rng.normal(size=(pages, rows)))
        logits[1:] = torch.from_numpy(rng.normal(size=(count - 1, 230, rows)))
        alone = page_mass(logits[:1, :pages])
        torch.testing.assert_close(alone, logits[:1, :pages].softmax(dim=1))
        assert torch.equal(page_mass(logits)[:1, :pages], alone)


def test_heads_choose_together_as_each_alone(rng, case):
    """Budgets of all kinds, neighbours of one kind with other values, floors and caps."""
    budgets = [TopP(0.3, 0, 99), TopP(0.9, 2, 4), TopK(3, 0, 9), TopP(0.6, 1, 99), Share(0.2, 0, 9)]
    shape = (len(budgets), PAGES, BLOCKS, ROWS)
    logits = case[0].logits + torch.from_numpy(rng.normal(size=shape)).float()
    own, static = case[0].own, torch.from_numpy(rng.random((len(budgets), BLOCKS, PAGES)) < 0.1)
    static &= torch.arange(PAGES) <= own[:, None]
    mass = page_mass(logits)
    together = mass.transpose(0, 1).flatten(1, 2), static.flatten(0, 1), own.repeat(len(budgets))
    found = choose(PageMasses.of(*together), budgets).view(static.shape)
    for each, mine, only, budget in zip(found, mass, static, budgets, strict=True):
        assert torch.equal(each, choose(PageMasses.of(mine, only, own), [budget]))


def test_of_equal_pages_all_are_chosen(case):
    scores, static = case
    causal = torch.arange(PAGES) <= scores.own[:, None]
    alike = scores._replace(
        logits=torch.where(causal.t()[..., None], scores.logits * 0, -torch.inf)
    )
    assert torch.equal(alike.choose(static, [TopK(1, 0, 1)]), causal & ~static)


@pytest.mark.parametrize(
    ("budget", "pages"),
    [
        (TopK(3, 0, 9), [3, 3, 3]),
        (TopK(3, 5, 9), [5, 5, 5]),
        (Share(0.1, 0, 9), [1, 1, 9]),
        (Share(0.1, 2, 4), [2, 2, 4]),
        (TopP(0.9, 0, 99), [1, 5, 50]),  # by the measured share, not by the mass
    ],
)
def test_expected_pages(budget, pages):
    assert budget.expected(np.array([1, 10, 100]), 0.5).tolist() == pages


@pytest.mark.parametrize(
    ("budget", "stored", "other"),
    [
        (TopK(3, 1, 4), 96, TopK(1, 1, 1)),
        (Share(0.25, 1, 4), 0.25, Share(0.25, 1, 1)),
        (TopP(0.5, 1, 4), 0.5, TopP(0.5, 1, 1)),
    ],
)
def test_stored_in_tokens_whatever_the_page(random_masks, budget, stored, other):
    dynamic = random_masks(dynamic=True).dynamic
    dynamic.put(1, 0, 5, budget, 0.125, page=32)
    at = (1, 0)
    assert (dynamic.channels[at], dynamic.kinds[at], dynamic.budgets[at]) == (
        5,
        budget.kind,
        stored,
    )
    assert (dynamic.floors[at], dynamic.caps[at]) == (32, 128)
    assert dynamic.expected[at] == (0.125 if budget.kind == BudgetKind.TOP_P else 0)
    assert dynamic.budget(*at, page=32) == budget
    assert dynamic.budget(*at, page=128) == other


def test_floors_and_values_are_rounded_up_and_no_cap_lies_below_its_floor(random_masks):
    dynamic = random_masks(dynamic=True).dynamic
    at = (0, 0)
    dynamic.kinds[at], dynamic.budgets[at] = BudgetKind.TOP_K, 33
    dynamic.floors[at], dynamic.caps[at] = 65, 10
    assert dynamic.budget(*at, page=32) == TopK(2, 3, 3)


def test_every_kind_is_registered_as_its_own():
    assert {kind: each.kind for kind, each in BUDGETS.items()} == {
        kind: kind for kind in BudgetKind
    }
