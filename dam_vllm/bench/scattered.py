"""Page masks of a wanted density at any length: pages at random distances, other ones a head."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from dam_vllm.bench.gpu_case import DTYPE, Case
from dam_vllm.bench.roof import Work
from dam_vllm.masks.page_tables import PageSelector, PageTables

SEED = 2508
# Densities of KV heads under the demo model's fitted masks at 32768 tokens, over their mean.
FITTED = (0.24, 0.26, 0.27, 0.32, 0.49, 1.5, 1.7, 3.22)


class Spread(StrEnum):
    """How a density is spread over KV heads."""

    EVEN = "even"
    """All heads alike."""
    MIXED = "mixed"
    """As in fitted masks: few heads read much, most read little."""
    DYNAMIC = "dynamic"
    """All alike, a quarter of them by pages that they choose."""
    REUSE = "reuse"
    """The same, but only one layer in four chooses; the others reuse its pages."""
    TAIL = "tail"
    """All heads alike, and all with a tail."""


@dataclass(frozen=True)
class Selection:
    """What the heads of a case read.

    Attributes:
        spread: over its heads.
        tables: of all KV heads; of those that choose, what they read anyway.
        choosing: how many KV heads, the first ones, choose pages.
        chosen: pages that each of them chooses.
        pages: bool [kv_heads, query_blocks, pages], what each query block of a request reads; on
            the host. Of heads that choose, as many pages as they read, but others.
        density: pages read over pages of dense causal attention.
        work: what attention over these pages takes.
    """

    spread: Spread
    tables: PageTables
    choosing: int
    chosen: int
    pages: torch.Tensor
    density: float
    work: Work

    @property
    def exact(self) -> bool:
        """Whether heads read `pages` themselves, and nothing stands for the others."""
        return not self.choosing and self.spread != Spread.TAIL

    def selector(self, device: torch.device) -> PageSelector:
        """The tables on a device."""
        return PageSelector([self.tables], device=device)


def scattered(case: Case, density: float, spread: Spread = Spread.EVEN) -> Selection:
    """A selection whose density is the nearest to the wanted one that there is.

    Args:
        case: the geometry.
        density: wanted, above 0 up to 1.
        spread: over KV heads.
    """
    wanted = np.full(case.kv_heads, density)
    if spread == Spread.MIXED:
        wanted = _mixed(case.kv_heads, density)
    tables = scattered_tables(case, wanted)
    pages = torch.from_numpy(tables.select(case.query_blocks)[..., : case.pages])
    choosing = max(1, case.kv_heads // 4) if spread in (Spread.DYNAMIC, Spread.REUSE) else 0
    # What is read anyway is the first page and the query block's own.
    anyway = (torch.from_numpy(case.query_blocks) + 1).clamp_max(2) * case.own
    chosen = int((pages[:choosing].sum(-1) - anyway).float().mean().round()) if choosing else 0
    tables.distances[:choosing] = False
    return Selection(
        spread=spread,
        tables=tables,
        choosing=choosing,
        chosen=max(0, chosen),
        pages=pages,
        density=float(pages.sum() / every_page(case).sum() / case.kv_heads),
        work=work(case, pages),
    )


def _mixed(kv_heads: int, density: float) -> np.ndarray:
    """Densities of heads, spread as those of fitted masks; none above 1."""
    places = (np.arange(kv_heads) + 0.5) / kv_heads * (len(FITTED) - 1)
    relative = np.interp(places, np.arange(len(FITTED)), FITTED)
    found = density * relative / relative.mean()
    # What a dense head cannot take more of, the others read.
    for _ in range(kv_heads):
        spare, open_ = np.maximum(found - 1, 0).sum(), found < 1
        found = np.minimum(found, 1.0)
        if spare > 0 and open_.any():
            found[open_] *= 1 + spare / found[open_].sum()
    return np.minimum(found, 1.0)


def scattered_tables(case: Case, densities: Sequence[float] | np.ndarray) -> PageTables:
    """The first page, the query block's own, and pages at distances drawn for each head.

    Args:
        case: the geometry.
        densities: wanted, a KV head.

    Returns:
        Tables over KV heads.
    """
    distances = np.arange(case.pages)
    # Page 0 is read anyway, so a distance adds a page where it ends on a later one.
    gained = (case.query_blocks[:, None] * case.own - distances >= 1).sum(axis=0)
    useful = np.flatnonzero(gained * (distances > 0))
    causal = (case.query_blocks + 1) * case.own
    least = np.minimum(causal, case.own + 1).sum()
    kept = np.zeros((case.kv_heads, case.pages + 1), dtype=bool)
    rng = np.random.default_rng(SEED)
    for head, density in zip(kept, densities, strict=True):
        order = rng.permutation(useful)
        read = least + np.concatenate([[0], gained[order].cumsum()])
        head[order[: np.abs(read / causal.sum() - density).argmin()]] = True
    return PageTables(
        page=case.page,
        query_block=case.query_block,
        near=np.ones((case.kv_heads, 1, case.own), dtype=bool),
        columns=np.zeros((case.kv_heads, case.own), dtype=bool),
        distances=kept,
        dense=np.zeros(case.kv_heads, dtype=bool),
    )


def every_page(case: Case) -> torch.Tensor:
    """What dense causal attention reads, bool [query_blocks, pages]."""
    last = torch.from_numpy((case.query_blocks + 1) * case.own)
    return torch.arange(case.pages) < last[:, None]


def work(case: Case, pages: torch.Tensor) -> Work:
    """The least that attention over some pages takes.

    Args:
        case: the geometry.
        pages: bool [kv_heads, query_blocks, pages].

    Returns:
        Products over the keys that causal queries see, and bytes of queries, outputs, and of
        each key and value that is read, once.
    """
    rows = min(case.queries, case.query_block)
    # Of a query block's own pages its queries see on average half, the last token's all.
    own_keys = rows * case.query_block - rows * (rows - 1) // 2
    before = int(pages.sum()) - pages.shape[0] * pages.shape[1] * case.own
    pairs = before * case.page * rows + pages.shape[0] * pages.shape[1] * own_keys
    distinct = int(pages.any(dim=1).sum()) * case.page * case.head_size
    return Work(
        flops=4.0 * case.batch * case.heads_per_kv * case.head_size * pairs,
        bytes=2.0 * case.query_bytes + 2.0 * DTYPE.itemsize * case.batch * distinct,
    )
