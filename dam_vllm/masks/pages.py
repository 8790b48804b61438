"""Masks rounded up to pages: which pages a KV head reads for a tile of queries.

A tile is `tile` consecutive query positions, cut at multiples of `tile` of the absolute
position; `tile` is a multiple of the page size. A page of keys before the tile is read if
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
        columns: bool [heads, near_pages], pages with a kept column.
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


def page_tables(masks: MaskSet, layer: int, page: int) -> PageTables:
    """Rounds one layer's masks up to pages and joins each KV head's query heads.

    Args:
        masks: the mask set.
        layer: global layer index.
        page: tokens a page.

    Returns:
        Tables over KV heads.
    """
    return _join(_head_tables(masks, layer, page), masks.heads // masks.kv_heads)


def _head_tables(masks: MaskSet, layer: int, page: int) -> PageTables:
    """Tables over query heads."""
    tile = tile_size(page)
    near_tiles = -(-masks.pcl // tile)
    near_pages = near_tiles * tile // page
    seen = allowed(masks, layer, 0, near_tiles * tile).reshape(
        masks.heads, near_tiles, tile, near_pages, page
    )
    return PageTables(
        page=page,
        tile=tile,
        near=np.asarray(seen.any(axis=(2, 4))),
        columns=_pad(_any_run(masks.columns[layer], page), near_pages),
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
            own = _head_tables(masks, layer, page)
            joined = _join(own, masks.heads // masks.kv_heads)
            for row, length in enumerate(lengths):
                heads[row, layer] = _density(own, length, dense_below)
                kv_heads[row, layer] = _density(joined, length, dense_below)
    return heads, kv_heads


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
