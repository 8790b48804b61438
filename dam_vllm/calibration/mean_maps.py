"""Mean attention maps by position (paper, Stage 1: A / (C + epsilon))."""

import numpy as np
import torch


def pair_counts(lengths: list[int], pcl: int) -> np.ndarray:
    """How many windows have a query at each position.

    A pair (i, j) with j <= i is valid in every window longer than i, so C[i, j] = C[i].

    Args:
        lengths: tokens of each window.
        pcl: Pattern Capture Length.

    Returns:
        int64 [pcl].
    """
    return (np.asarray(lengths)[:, None] > np.arange(pcl)[None]).sum(axis=0)


class MapSums:
    """Attention weights of a group of layers, summed over windows.

    Attributes:
        layers: global indices of the layers.
        sums: float32 [layers, heads, pcl, pcl].
    """

    def __init__(self, layers: list[int], sums: torch.Tensor) -> None:
        self.layers = layers
        self.sums = sums
        self._slots = {layer: slot for slot, layer in enumerate(layers)}
        self._lengths: list[int] = []

    def start_batch(self, lengths: list[int]) -> None:
        """Tells the true lengths of the next batch's windows; what follows is padding."""
        self._lengths = lengths

    def observe(self, layer: int, start: int, weights: torch.Tensor) -> None:
        """Adds a block of weights [batch, heads, rows, keys] (see `capture.Observer`)."""
        pcl = self.sums.shape[-1]
        sums = self.sums[self._slots[layer]]
        keys = min(weights.shape[3], pcl)
        for row, length in enumerate(self._lengths):
            stop = min(start + weights.shape[2], length, pcl)
            if stop > start:
                sums[:, start:stop, :keys] += weights[row, :, : stop - start, :keys]

    def mean(self, layer: int, counts: np.ndarray, epsilon: float) -> torch.Tensor:
        """Returns one layer's mean map, float32 [heads, pcl, pcl]."""
        sums = self.sums[self._slots[layer]]
        divisor = torch.from_numpy(counts).to(sums.device, torch.float32) + epsilon
        return sums / divisor[:, None]
