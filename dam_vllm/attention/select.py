"""Selection: the pages that each (layer, KV head, tile) reads, vectorised over all three."""

from collections.abc import Sequence

import numpy as np
import torch

from dam_vllm.masks.pages import PageTables


class PageSelector:
    """Page tables of one worker's layers and KV heads, stacked on its device.

    A selection depends on the layer, the KV head and the tile's absolute position alone, never
    on how a prompt was chunked or batched.

    Attributes:
        page: tokens a page.
        tile: tokens a tile.
        layers: number of layers.
        heads: KV heads a layer.
        dense_tiles: tiles before this index read every page.
        near: bool [layers, heads, near_tiles, near_pages], tiles that start below the PCL.
        columns: bool [layers, heads, n], by page.
        distances: bool [layers, heads, n], by distance in pages back from the tile's first one;
            the last entry stands for all farther ones.
    """

    def __init__(
        self, tables: Sequence[PageTables], dense_below: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        """Stacks the tables of the layers, which share page size and number of heads."""
        first = tables[0]
        self.page, self.tile = first.page, first.tile
        self.layers, self.heads = len(tables), len(first.columns)
        self.dense_tiles = -(-dense_below // self.tile)
        near = np.stack([table.near for table in tables])
        columns = np.stack([table.columns for table in tables])
        distances = np.stack([table.distances for table in tables])
        dense = np.stack([table.dense for table in tables])[..., None]
        # Index 0 stands for the tile's own pages, the last one for pages out of reach.
        distances = np.pad(distances, ((0, 0), (0, 0), (0, 1)))
        distances[..., 0] = True
        distances |= dense
        columns[..., 0] = True
        near[..., 0] = True
        for tile in range(near.shape[2]):
            near[:, :, tile, tile * self.own : (tile + 1) * self.own] = True
        near |= dense[..., None]
        self.near = torch.from_numpy(near).to(device)
        self.columns = torch.from_numpy(columns).to(device)
        self.distances = torch.from_numpy(distances).to(device)

    @property
    def own(self) -> int:
        """Pages a tile."""
        return self.tile // self.page

    def select(self, tiles: torch.Tensor, pages: int) -> torch.Tensor:
        """Pages of whole tiles, own pages included.

        Args:
            tiles: int64 [n], tile indices (absolute position // tile).
            pages: pages to tell about; pages after a tile are False.

        Returns:
            bool [layers, heads, n, pages].
        """
        page = torch.arange(pages, device=tiles.device)
        distance = tiles[:, None] * self.own - page
        reach = distance.clamp(0, self.distances.shape[2] - 1)
        selected = self.distances[:, :, reach]
        columns = min(pages, self.columns.shape[2])
        selected[..., :columns] |= self.columns[:, :, None, :columns]
        self._select_near(selected, tiles)
        selected |= (tiles < self.dense_tiles)[:, None]
        selected &= distance > -self.own
        return selected

    def _select_near(self, selected: torch.Tensor, tiles: torch.Tensor) -> None:
        """Overwrites the rows of tiles that start below the PCL by the true mask."""
        near_tiles, near_pages = self.near.shape[2:]
        rows = (tiles < near_tiles).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        pages = min(selected.shape[3], near_pages)
        selected[:, :, rows, :pages] = self.near[:, :, tiles[rows], :pages]
