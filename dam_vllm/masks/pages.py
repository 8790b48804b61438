"""Masks rounded up to pages: which pages a KV head reads for a tile of queries.

A tile is `tile` consecutive query positions, cut at multiples of `tile` of the absolute
position; `tile` is a multiple of the page size. Dynamic heads take one page for a tile, since a
prefix found in the cache ends at a page. A page of keys before the tile is read if
any query of the tile, for any query head of the KV head's group, may see any key in it.
The first page and the tile's own pages are always read, so no row is empty.

Beyond the PCL a column's page is fixed and a diagonal's page distance to the tile is the
same for every tile, so two bit tables say everything; below it a table over (tile, page)
holds the true mask.
"""

from dataclasses import dataclass, replace

import numpy as np

from dam_vllm.masks.extension import allowed
from dam_vllm.masks.mask_set import BoolArray, FloatArray, HeadMode, MaskSet

MIN_TILE = 128


def tile_size(page: int) -> int:
    """Tokens in a tile: the smallest multiple of the page size from MIN_TILE on."""
    return -(-MIN_TILE // page) * page


@dataclass(frozen=True)
class PageTables:
    """Page-level masks of one layer; `heads` are KV heads, or query heads before they are joined.

    Attributes:
        page: tokens a page.
        tile: tokens a tile.
        near: bool [heads, near_tiles, near_pages], for the tiles that start below the PCL.
        columns: bool [heads, at least near_pages], pages with a kept column.
        distances: bool [heads, n], by distance in pages from the tile's first page back to a
            page; index 0 is unused.
        dense: bool [heads], heads that read every page.
    """

    page: int
    tile: int
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

    def select(self, tiles: np.ndarray) -> BoolArray:
        """Pages read by whole tiles, own pages included: bool [heads, len(tiles), pages]."""
        own = self.tile // self.page
        pages = np.arange((int(tiles.max()) + 1) * own)
        distance = tiles[:, None] * own - pages[None]
        column = np.zeros((len(self.columns), len(pages)), dtype=bool)
        reach = min(len(pages), self.columns.shape[1])
        column[:, :reach] = self.columns[:, :reach]
        inside = (distance > 0) & (distance < self.distances.shape[1])
        far = column[:, None] | (self.distances[:, np.where(inside, distance, 0)] & inside)
        for row, tile in enumerate(tiles):
            if tile < self.near.shape[1]:
                far[:, row] = False
                reach = min(len(pages), self.near.shape[2])
                far[:, row, :reach] = self.near[:, tile, :reach]
        far[:, :, 0] = True
        far[self.dense] = True
        return np.where(distance > 0, far, distance > -own)


def page_tables(masks: MaskSet, layer: int, page: int, tile: int | None = None) -> PageTables:
    """Rounds one layer's masks up to pages and joins each KV head's query heads.

    Args:
        masks: the mask set.
        layer: global layer index.
        page: tokens a page.
        tile: tokens a tile, a multiple of `page`; `tile_size(page)` unless told.

    Returns:
        Tables over KV heads.
    """
    tables = _head_tables(masks, layer, page, tile or tile_size(page))
    return _join(tables, masks.heads // masks.kv_heads)


def _head_tables(masks: MaskSet, layer: int, page: int, tile: int) -> PageTables:
    """Tables over query heads."""
    near_tiles = -(-masks.pcl // tile)
    near_pages = near_tiles * tile // page
    seen = allowed(masks, layer, 0, near_tiles * tile).reshape(
        masks.heads, near_tiles, tile, near_pages, page
    )
    return PageTables(
        page=page,
        tile=tile,
        near=np.asarray(seen.any(axis=(2, 4))),
        columns=_pad(
            _any_run(masks.columns[layer], page), max(near_pages, -(-masks.reach // page))
        ),
        distances=_page_distances(masks.diagonals[layer], page, tile),
        dense=np.repeat(masks.modes[layer] == HeadMode.DENSE, masks.heads // masks.kv_heads),
    )


def _join(tables: PageTables, group: int) -> PageTables:
    """Or over the query heads of each group."""
    joined = {
        name: getattr(tables, name).reshape(-1, group, *getattr(tables, name).shape[1:]).any(axis=1)
        for name in ("near", "columns", "distances", "dense")
    }
    return replace(tables, **joined)


def density(
    masks: MaskSet, lengths: list[int], page: int, dense_below: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Pages read over pages of dense causal attention, for prompts of some lengths.

    Both count whole tiles against all pages up to the tile's end, as they are read.

    Args:
        masks: the mask set.
        lengths: prompt lengths in tokens.
        page: tokens a page.
        dense_below: positions below it are read densely.

    Returns:
        float32 [len(lengths), layers, heads] of each query head on its own, and float32
        [len(lengths), layers, kv_heads] of what is read. Layers left to vLLM count 1.
    """
    shape = (len(lengths), masks.layers)
    heads = np.ones((*shape, masks.heads), dtype=np.float32)
    kv_heads = np.ones((*shape, masks.kv_heads), dtype=np.float32)
    for layer, kind in enumerate(masks.header.layer_types):
        if kind == "full":
            measured = [_static(masks, layer, length, page, dense_below) for length in lengths]
            heads[:, layer], kv_heads[:, layer] = (
                np.stack(part) for part in zip(*measured, strict=True)
            )
            _add_dynamic(masks, layer, lengths, page, dense_below, heads, kv_heads)
    return heads, kv_heads


def _static(
    masks: MaskSet, layer: int, length: int, page: int, dense_below: int
) -> tuple[FloatArray, FloatArray]:
    """Density of a layer's heads, as if none were dynamic."""
    tables = _head_tables(masks, layer, page, tile_size(page))
    joined = _join(tables, masks.heads // masks.kv_heads)
    return _density(tables, length, dense_below), _density(joined, length, dense_below)


def _add_dynamic(
    masks: MaskSet,
    layer: int,
    lengths: list[int],
    page: int,
    dense_below: int,
    heads: FloatArray,
    kv_heads: FloatArray,
) -> None:
    """Overwrites a layer's dynamic heads; query heads read what their KV head reads."""
    dynamic = np.flatnonzero(masks.modes[layer] == HeadMode.DYNAMIC)
    if masks.dynamic is None or not len(dynamic):
        return
    tables = page_tables(masks, layer, page, tile=page)
    dense_below = -(-dense_below // tile_size(page)) * tile_size(page)
    for row, length in enumerate(lengths):
        causal = np.arange(-(-length // page)) + 1
        read = tables.select(causal - 1).sum(axis=2)[dynamic]
        chosen = [masks.dynamic.chosen(layer, head, page, causal) for head in dynamic]
        read = np.where((causal - 1) * page < dense_below, causal, read + np.stack(chosen))
        kv_heads[row, layer, dynamic] = np.minimum(read, causal).sum(axis=1) / causal.sum()
    group = masks.heads // masks.kv_heads
    joined = np.repeat(kv_heads[:, layer], group, axis=1)
    own = np.isin(np.arange(masks.heads) // group, dynamic)
    heads[:, layer, own] = joined[:, own]


def _density(tables: PageTables, length: int, dense_below: int) -> FloatArray:
    tiles = np.arange(-(-length // tables.tile))
    pages = -(-length // tables.page)
    read = tables.select(tiles)[:, :, :pages]
    own = tables.tile // tables.page
    causal = np.arange(pages)[None] < (tiles[:, None] + 1) * own
    read = np.where((tiles < -(-dense_below // tables.tile))[:, None], causal, read)
    return np.asarray(read.sum(axis=(1, 2)) / causal.sum(), dtype=np.float32)


def _any_run(bits: BoolArray, run: int) -> BoolArray:
    """Or over runs of `run` entries of the last axis, the last run padded with False."""
    padded = _pad(bits, -(-bits.shape[-1] // run) * run)
    return np.asarray(padded.reshape(*bits.shape[:-1], -1, run).any(axis=-1))


def _pad(bits: BoolArray, size: int) -> BoolArray:
    return np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, size - bits.shape[-1])])


def _page_distances(diagonals: BoolArray, page: int, tile: int) -> BoolArray:
    """Page distances that a tile reaches by its kept diagonals, bool [heads, n].

    Queries a..a+tile-1 on diagonal r see keys a-r..a+tile-1-r, so the key pages before the
    tile lie between distance ceil((r - tile + 1) / page), at least 1, and ceil(r / page).
    """
    heads, pcl = diagonals.shape
    result = np.zeros((heads, -(-pcl // page) + 2), dtype=bool)
    for head, kept in zip(*np.nonzero(diagonals), strict=True):
        first = max(1, -(-(kept - tile + 1) // page))
        result[head, first : -(-kept // page) + 1] = True
    return result
