"""Masks rounded up to pages: which pages a KV head reads for a query block of queries.

A query block is `query_block` consecutive query positions, cut at multiples of `query_block` of
the absolute position; `query_block` is a multiple of the page size. Dynamic heads take one page
for a query block, since a prefix found in the cache ends at a page. A page of keys before the
query block is read if any query of the query block, for any of the KV head's query heads, may
see any key in it. The first page and the query block's own pages are always read, so no row is
empty.

Beyond the PCL a column's page is fixed and a diagonal's page distance to the query block is the
same for every query block, so two bit tables say everything; below it a table over (query block,
page) holds the true mask.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from dam_vllm.masks.mask_set import BoolArray, HeadMode, MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.rule import allowed

MIN_QUERY_BLOCK = 128


def query_block_size(page: int) -> int:
    """Tokens in a query block: the smallest multiple of the page size from MIN_QUERY_BLOCK on."""
    return ceil_div(MIN_QUERY_BLOCK, page) * page


def dense_until(dense_below: int, page: int) -> int:
    """Position up to which queries read everything, whatever their head's mode.

    Args:
        dense_below: positions below it are to read everything.
        page: tokens a page.

    Returns:
        `dense_below` rounded up to whole query blocks of static heads, in tokens.
    """
    query_block = query_block_size(page)
    return ceil_div(dense_below, query_block) * query_block


@dataclass(frozen=True)
class PageTables:
    """Page-level masks of one layer; `heads` are KV heads, or query heads before they are joined.

    Attributes:
        page: tokens a page.
        query_block: tokens a query block.
        near: bool [heads, near_blocks, near_pages], for the query blocks that start below the PCL.
        columns: bool [heads, at least near_pages], pages with a kept column.
        distances: bool [heads, n], by distance in pages from the query block's first page back to a
            page; index 0 is unused.
        dense: bool [heads], heads that read every page.
    """

    page: int
    query_block: int
    near: BoolArray
    columns: BoolArray
    distances: BoolArray
    dense: BoolArray

    def take(self, heads: slice | list[int]) -> "PageTables":
        """The tables of some heads."""
        return replace(
            self,
            near=self.near[heads],
            columns=self.columns[heads],
            distances=self.distances[heads],
            dense=self.dense[heads],
        )

    @classmethod
    def joined(cls, tables: Sequence["PageTables"]) -> "PageTables":
        """The tables of several layers' heads, as if of one layer."""

        def both(name: str) -> BoolArray:
            return np.concatenate([getattr(each, name) for each in tables])

        return replace(
            tables[0],
            near=both("near"),
            columns=both("columns"),
            distances=both("distances"),
            dense=both("dense"),
        )

    def join(self, heads_per_kv: int) -> "PageTables":
        """Or over the query heads of each KV head."""

        def either(bits: BoolArray) -> BoolArray:
            return np.asarray(bits.reshape(-1, heads_per_kv, *bits.shape[1:]).any(axis=1))

        return replace(
            self,
            near=either(self.near),
            columns=either(self.columns),
            distances=either(self.distances),
            dense=either(self.dense),
        )

    def select(self, query_blocks: np.ndarray, dense_below: int = 0) -> BoolArray:
        """Pages read by whole query blocks, own pages included: bool [heads, blocks, pages]."""
        selector, blocks = PageSelector([self], dense_below), torch.from_numpy(query_blocks)
        pages = (int(query_blocks.max()) + 1) * selector.own
        return selector.select(blocks, pages)[0].numpy()


def page_tables(
    masks: MaskSet, layer: int, page: int, query_block: int | None = None
) -> PageTables:
    """Rounds one layer's masks up to pages and joins each KV head's query heads.

    Args:
        masks: the mask set.
        layer: global layer index.
        page: tokens a page.
        query_block: tokens a query block, a multiple of `page`; `query_block_size(page)` unless
            told.

    Returns:
        Tables over KV heads.
    """
    tables = head_tables(masks, layer, page, query_block or query_block_size(page))
    return tables.join(masks.heads // masks.kv_heads)


def head_tables(masks: MaskSet, layer: int, page: int, query_block: int) -> PageTables:
    """The same tables over query heads, before they are joined."""
    near_blocks = ceil_div(masks.pcl, query_block)
    near_pages = near_blocks * query_block // page
    seen = allowed(masks, layer, 0, near_blocks * query_block).reshape(
        masks.heads, near_blocks, query_block, near_pages, page
    )
    return PageTables(
        page=page,
        query_block=query_block,
        near=np.asarray(seen.any(axis=(2, 4))),
        columns=_pad(
            _any_run(masks.columns[layer], page), max(near_pages, ceil_div(masks.reach, page))
        ),
        distances=_page_distances(masks.diagonals[layer], page, query_block),
        dense=np.repeat(masks.modes[layer] == HeadMode.DENSE, masks.heads // masks.kv_heads),
    )


def _any_run(bits: BoolArray, run: int) -> BoolArray:
    """Or over runs of `run` entries of the last axis, the last run padded with False."""
    padded = _pad(bits, ceil_div(bits.shape[-1], run) * run)
    return np.asarray(padded.reshape(*bits.shape[:-1], -1, run).any(axis=-1))


def _pad(bits: BoolArray, size: int) -> BoolArray:
    return np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, size - bits.shape[-1])])


def _page_distances(diagonals: BoolArray, page: int, query_block: int) -> BoolArray:
    """Page distances that a query block reaches by its kept diagonals, bool [heads, n].

    Queries a..a+query block-1 on diagonal r see keys a-r..a+query block-1-r, so the key pages
    before the query block lie between distance ceil((r - query block + 1) / page), at least 1, and
    ceil(r / page).
    """
    heads, pcl = diagonals.shape
    result = np.zeros((heads, ceil_div(pcl, page) + 2), dtype=bool)
    for head, bits in enumerate(diagonals):
        kept = np.flatnonzero(bits)
        first = np.maximum(1, ceil_div(kept - query_block + 1, page))
        starts, stops = (
            np.bincount(at, minlength=result.shape[1]) for at in (first, ceil_div(kept, page) + 1)
        )
        result[head] = np.cumsum(starts - stops) > 0
    return result


class PageSelector:
    """Page tables of one worker's layers and KV heads, stacked on its device.

    A selection depends on the layer, the KV head and the query block's absolute position alone,
    never on how a prompt was chunked or batched.

    Attributes:
        page: tokens a page.
        query_block: tokens a query block.
        layers: number of layers.
        heads: KV heads a layer.
        dense_blocks: query blocks before this index read every page.
        near: bool [layers, heads, near_blocks, near_pages], query blocks that start below the PCL.
        columns: bool [layers, heads, n], by page.
        distances: bool [layers, heads, n], by distance in pages back from the query block's first
            one; the last entry stands for all farther ones.
    """

    def __init__(
        self, tables: Sequence[PageTables], dense_below: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        """Stacks the tables of the layers, which share page size and number of heads.

        Args:
            tables: of the layers.
            dense_below: positions below it are to read everything, see `dense_until`.
            device: where the tables are to lie.
        """
        first = tables[0]
        self.page, self.query_block = first.page, first.query_block
        self.layers, self.heads = len(tables), len(first.columns)
        self.dense_blocks = ceil_div(dense_until(dense_below, self.page), self.query_block)
        near = np.stack([table.near for table in tables])
        columns = np.stack([table.columns for table in tables])
        distances = np.stack([table.distances for table in tables])
        dense = np.stack([table.dense for table in tables])[..., None]
        # Index 0 stands for the query block's own pages, the last one for pages out of reach.
        distances = np.pad(distances, ((0, 0), (0, 0), (0, 1)))
        distances[..., 0] = True
        distances |= dense
        columns[..., 0] = True
        near[..., 0] = True
        for query_block in range(near.shape[2]):
            near[:, :, query_block, query_block * self.own : (query_block + 1) * self.own] = True
        near |= dense[..., None]
        self.near = torch.from_numpy(near).to(device)
        self.columns = torch.from_numpy(columns).to(device)
        self.distances = torch.from_numpy(distances).to(device)

    @classmethod
    def joined(cls, selectors: Sequence["PageSelector"]) -> "PageSelector":
        """Heads of several selectors as if of one; they differ in nothing else."""
        made = copy(selectors[0])
        for name in ("near", "columns", "distances"):
            setattr(made, name, torch.cat([getattr(each, name) for each in selectors], dim=1))
        made.heads = made.near.shape[1]
        return made

    @property
    def own(self) -> int:
        """Pages a query block."""
        return self.query_block // self.page

    def select(self, query_blocks: torch.Tensor, pages: int) -> torch.Tensor:
        """Pages of whole query blocks, own pages included.

        Args:
            query_blocks: int64 [n], query block indices (absolute position // query block).
            pages: pages to tell about; pages after a query block are False.

        Returns:
            bool [layers, heads, n, pages].
        """
        page = torch.arange(pages, device=query_blocks.device)
        distance = query_blocks[:, None] * self.own - page
        reach = distance.clamp(0, self.distances.shape[2] - 1)
        selected = self.distances[:, :, reach]
        columns = min(pages, self.columns.shape[2])
        selected[..., :columns] |= self.columns[:, :, None, :columns]
        self._select_near(selected, query_blocks)
        selected |= (query_blocks < self.dense_blocks)[:, None]
        selected &= distance > -self.own
        return selected

    def _select_near(self, selected: torch.Tensor, query_blocks: torch.Tensor) -> None:
        """Overwrites the rows of query blocks that start below the PCL by the true mask."""
        near_blocks, near_pages = self.near.shape[2:]
        rows = (query_blocks < near_blocks).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        pages = min(selected.shape[3], near_pages)
        selected[:, :, rows, :pages] = self.near[:, :, query_blocks[rows], :pages]
