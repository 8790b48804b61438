"""Mean attention maps by position (paper, Stage 1: A / (C + epsilon)), of tokens or of pages.

A cell of a map of pages is the attention mass that a query of the query page gives to the key
page, a mean over the page's queries and the windows. With pages of one token it is the paper's
mean map, so both kinds are summed by the same code, and neither needs a whole matrix of
weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.masks.rounding import ceil_div


def pair_counts(lengths: list[int], size: int, page: int = 1) -> np.ndarray:
    """How many queries the windows have at each position, or in each page of positions.

    A pair (i, j) with j <= i is valid in every window longer than i, so C[i, j] = C[i].

    Args:
        lengths: tokens of each window.
        size: pages a side of the map.
        page: tokens a page.

    Returns:
        int64 [size].
    """
    queries = np.asarray(lengths)[:, None] > np.arange(size * page)[None]
    return queries.sum(axis=0).reshape(size, page).sum(axis=1)


@dataclass(frozen=True)
class MeanMaps:
    """Mean maps of a calibration's layers, one layer in memory at a time.

    Attributes:
        load: gives a layer's mean map, float32 [heads, size, size].
        counts: int64 [size], queries of each row (`pair_counts`).
        page: tokens a page; 1 for maps of tokens.
    """

    load: Callable[[int], torch.Tensor]
    counts: np.ndarray
    page: int = 1

    @property
    def tokens(self) -> int:
        """Length that the maps span: the PCL, or the reach of maps of pages."""
        return len(self.counts) * self.page


class MapSums:
    """Attention weights of the layers of a pass, summed over windows.

    Attributes:
        layers: global indices of the layers.
        sums: float32 [layers, heads, size, size].
        page: tokens a page.
    """

    def __init__(self, layers: list[int], sums: torch.Tensor, page: int = 1) -> None:
        self.layers = layers
        self.sums = sums
        self.page = page
        self._slots = {layer: slot for slot, layer in enumerate(layers)}
        self._lengths: list[int] = []

    def start_batch(self, lengths: list[int]) -> None:
        """Tells the true lengths of the next batch's windows; what follows is padding."""
        self._lengths = lengths

    def observe(self, layer: int, start: int, weights: torch.Tensor) -> None:
        """Adds a block of weights [batch, heads, rows, keys] (see `capture.Observer`)."""
        tokens = self.sums.shape[-1] * self.page
        sums = self.sums[self._slots[layer]]
        keys = min(weights.shape[3], tokens)
        for row, length in enumerate(self._lengths):
            stop = min(start + weights.shape[2], length, tokens)
            if stop > start:
                self._add(sums, start, weights[row, :, : stop - start, :keys])

    def mean(self, layer: int, counts: np.ndarray, epsilon: float) -> torch.Tensor:
        """Returns one layer's mean map, float32 [heads, size, size]."""
        sums = self.sums[self._slots[layer]]
        divisor = torch.from_numpy(counts).to(sums.device, torch.float32) + epsilon
        return sums / divisor[:, None]

    def _add(self, sums: torch.Tensor, start: int, weights: torch.Tensor) -> None:
        """Adds weights [heads, rows, keys]; either side may begin or end inside a page."""
        rows, keys = weights.shape[1:]
        if self.page == 1:
            sums[:, start : start + rows, :keys] += weights
            return
        pages = ceil_div(keys, self.page)
        whole = keys // self.page * self.page
        mass = weights[..., :whole].unflatten(-1, (-1, self.page)).sum(dim=-1)
        if whole < keys:
            mass = torch.cat((mass, weights[..., whole:].sum(dim=-1, keepdim=True)), dim=-1)
        index = torch.arange(start, start + rows, device=sums.device) // self.page
        sums[:, :, :pages].index_add_(1, index, mass)
