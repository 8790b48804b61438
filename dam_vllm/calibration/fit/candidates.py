"""What a KV head may become: static patterns, dynamic budgets on top of them, or dense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.masks.budget import Budget, BudgetKind, Share, TopK, TopP
from dam_vllm.masks.frontier_arrays import pack_pattern
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import PageSelector, PageTables, page_tables
from dam_vllm.masks.rounding import ceil_div

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
SHARES = (0.02, 0.05, 0.1)
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
MASS_FLOOR, MASS_CAP = 1, 64

DENSE, REUSE = -1, -2
"""What a head may be beside one of the candidates: dense, or a reader of its anchor's pages."""


@dataclass(frozen=True)
class Candidate:
    """One way of serving a KV head.

    Attributes:
        pattern: index of the static pattern that is read anyway.
        channels: channels that score, or None where nothing is chosen (static).
        budget: what is chosen, in pages, or None.
    """

    pattern: int
    channels: int | None = None
    budget: Budget | None = None

    def describe(self, patterns: Sequence["Pattern"]) -> str:
        """In a word or two, for reports."""
        if self.budget is None:
            return f"static {patterns[self.pattern].name}"
        kind = self.budget.kind.name.lower()
        return f"dynamic channels {self.channels} {kind} {self.budget.value:g}"


@dataclass(frozen=True)
class Pattern:
    """One (tau, mu), or no pattern at all.

    Attributes:
        name: for reports.
        build: makes its masks; they are large, so they are not kept.
    """

    name: str
    build: Callable[[], MaskSet]


def default_channels(head_size: int) -> list[int]:
    """An eighth, a quarter, a half and three quarters of a head's channels."""
    return [max(1, head_size * eighths // 8) for eighths in (1, 2, 4, 6)]


def dynamic_budgets() -> list[Budget]:
    """Budgets that are tried, of all kinds."""
    most = 10**6
    return [
        *(TopK(count, 0, count) for count in COUNTS),
        *(Share(share, 1, most) for share in SHARES),
        *(TopP(mass, MASS_FLOOR, MASS_CAP) for mass in MASSES),
    ]


def candidates(patterns: Sequence[Pattern], bare: int, channels: Sequence[int]) -> list[Candidate]:
    """All candidates but dense: every pattern as it stands, and budgets over the bare pattern.

    Args:
        patterns: static patterns.
        bare: index of the pattern that keeps nothing.
        channels: channels that score.

    Returns:
        The candidates.
    """
    static = [Candidate(index) for index in range(len(patterns))]
    budgets = dynamic_budgets()
    return static + [Candidate(bare, count, budget) for count in channels for budget in budgets]


def top_k(candidates: Sequence[Candidate], pages: int) -> int:
    """Index of the candidate that chooses some number of pages by the middle channels."""
    channels = sorted({each.channels for each in candidates if each.channels is not None})
    wanted = (channels[len(channels) // 2], BudgetKind.TOP_K, pages)
    return next(
        index
        for index, each in enumerate(candidates)
        if each.budget and (each.channels, each.budget.kind, each.budget.value) == wanted
    )


class LayerPatterns:
    """A layer's patterns at page granularity.

    Attributes:
        query_block: tokens a query block of static heads.
        tables: per pattern.
        static: per pattern, pages of static query blocks.
        bare: tables of the bare pattern, query blocks of one page.
        dynamic: its pages.
        packed: per pattern and KV head, the pattern deflated (`pack_pattern`).
    """

    def __init__(
        self, tables: list[PageTables], bare: PageTables, packed: list[list[bytes]]
    ) -> None:
        self.packed = packed
        self.query_block = tables[0].query_block
        self.tables, self.bare = tables, bare
        self.static = [PageSelector([each]) for each in tables]
        self.dynamic = PageSelector([bare])

    def static_pages(self, query_block: int, pages: int, head: int) -> torch.Tensor:
        """Pages that each pattern reads for one static query block: bool [patterns, pages]."""
        index = torch.tensor([query_block])
        return torch.stack([each.select(index, pages)[0, head, 0] for each in self.static])

    def densities(self, length: int, page: int) -> np.ndarray:
        """Density of each pattern: float32 [patterns, kv_heads]."""
        query_blocks = np.arange(ceil_div(length, self.query_block))
        own = self.query_block // page
        causal = ((query_blocks + 1) * own).sum()
        return np.stack(
            [tables.select(query_blocks).sum(axis=(1, 2)) / causal for tables in self.tables]
        )

    def bare_pages(self, length: int, page: int) -> np.ndarray:
        """Pages that a dynamic head reads anyway: int [kv_heads, query_blocks of one page]."""
        return np.asarray(self.bare.select(np.arange(ceil_div(length, page))).sum(axis=2))


def layer_patterns(
    patterns: Sequence[Pattern], bare: int, layers: Sequence[int], page: int
) -> dict[int, LayerPatterns]:
    """Rounds all patterns up to pages and packs them, one mask set in memory at a time.

    Args:
        patterns: static patterns.
        bare: index of the pattern that keeps nothing.
        layers: global layer indices.
        page: tokens a page.

    Returns:
        The patterns of each layer.
    """
    tables: dict[int, list[PageTables]] = {layer: [] for layer in layers}
    bares: dict[int, PageTables] = {}
    packed: dict[int, list[list[bytes]]] = {layer: [] for layer in layers}
    for index, pattern in enumerate(patterns):
        masks = pattern.build()
        for layer in layers:
            tables[layer].append(page_tables(masks, layer, page))
            packed[layer].append(_packed(masks, layer))
            if index == bare:
                bares[layer] = page_tables(masks, layer, page, query_block=page)
    return {layer: LayerPatterns(tables[layer], bares[layer], packed[layer]) for layer in layers}


def _packed(masks: MaskSet, layer: int) -> list[bytes]:
    """A layer's patterns, KV head by KV head."""
    columns, diagonals, true_bits = (
        np.split(array[layer], masks.kv_heads)
        for array in (masks.columns, masks.diagonals, masks.true_bits)
    )
    return [pack_pattern(*parts) for parts in zip(columns, diagonals, true_bits, strict=True)]


def dynamic_density(
    budget: Budget, anyway: np.ndarray, share: np.ndarray | float
) -> np.ndarray | float:
    """Density of a dynamic head.

    Args:
        budget: of the head.
        anyway: int [..., query_blocks], pages read anyway.
        share: measured share of the causal pages that the budget chooses.

    Returns:
        float [...].
    """
    causal = np.arange(anyway.shape[-1]) + 1
    chosen = budget.expected(causal, share)
    return np.asarray(np.minimum(anyway + chosen, causal).sum(axis=-1) / causal.sum())
