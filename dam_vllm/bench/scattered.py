"""Page masks of a wanted density at any length: pages at random distances, other ones a head."""

from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.bench.gpu_case import DTYPE, Case
from dam_vllm.bench.roof import Work
from dam_vllm.masks.page_tables import PageSelector, PageTables

SEED = 2508


@dataclass(frozen=True)
class Selection:
    """What the heads of a case read.

    Attributes:
        selector: page tables of one layer, on the device.
        pages: bool [kv_heads, query_blocks, pages], what each query block of a request reads; on
            the host.
        density: pages read over pages of dense causal attention.
        work: what attention over these pages takes.
    """

    selector: PageSelector
    pages: torch.Tensor
    density: float
    work: Work


def scattered(case: Case, density: float, device: torch.device) -> Selection:
    """A selection whose density is the nearest to the wanted one that there is.

    Args:
        case: the geometry.
        density: wanted, above 0 up to 1.
        device: where its tables are put.
    """
    tables = scattered_tables(case, density)
    pages = torch.from_numpy(tables.select(case.query_blocks)[..., : case.pages])
    return Selection(
        selector=PageSelector([tables], device=device),
        pages=pages,
        density=float(pages.sum() / every_page(case).sum() / case.kv_heads),
        work=work(case, pages),
    )


def scattered_tables(case: Case, density: float) -> PageTables:
    """The first page, the query block's own, and pages at distances drawn for each head.

    Args:
        case: the geometry.
        density: wanted.

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
    for head in kept:
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
        flops=4.0 * case.batch * case.group * case.head_size * pairs,
        bytes=2.0 * case.query_bytes + 2.0 * DTYPE.itemsize * case.batch * distinct,
    )
