"""Attention mass that the masks keep on held-out texts, per query head.

Measured on the token-exact mask with the keys that every row always sees (the first token and
the query's own, `dam_vllm.masks.rule.token_mask`); serving by pages reads more.
"""

import numpy as np
import torch

from dam_vllm.masks.mask_set import FloatArray, MaskSet
from dam_vllm.masks.rule import token_mask


class Coverage:
    """Observer (see `capture.Observer`) that sums kept attention by head.

    Rows below the PCL are measured under the true mask, the others under the extended one.
    """

    def __init__(self, masks: MaskSet) -> None:
        self._masks = masks
        self._kept = np.zeros((2, masks.layers, masks.heads))
        self._rows = np.zeros((2, masks.layers))
        self._lengths: list[int] = []

    def start_batch(self, lengths: list[int]) -> None:
        """Tells the true lengths of the next batch's windows; what follows is padding."""
        self._lengths = lengths

    def observe(self, layer: int, start: int, weights: torch.Tensor) -> None:
        """Adds a block of weights [batch, heads, rows, keys]."""
        pcl = self._masks.pcl
        stop = min(start + weights.shape[2], max(self._lengths))
        for part, (first, last) in enumerate(
            ((start, min(stop, pcl)), (max(start, pcl), stop)),
        ):
            if last <= first:
                continue
            mask = token_mask(self._masks, layer, first, last)
            allowed = torch.from_numpy(mask).to(weights.device)
            block = weights[:, :, first - start : last - start, :last]
            kept = (block * allowed).sum(dim=-1).double().cpu().numpy()
            for row, length in enumerate(self._lengths):
                count = max(0, min(length, last) - first)
                self._kept[part, layer] += kept[row, :, :count].sum(axis=-1)
                self._rows[part, layer] += count

    def result(self) -> tuple[FloatArray, FloatArray]:
        """Mean kept mass a row: float32 [layers, heads] below and from the PCL on, else NaN."""
        rows = self._rows[:, :, None]
        mean = np.where(rows > 0, self._kept / np.maximum(rows, 1), np.nan).astype(np.float32)
        return mean[0], mean[1]
