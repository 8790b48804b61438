"""Attention mass that the masks keep on held-out texts, per query head.

Measured on the token-exact mask with the keys that every row always sees (the first token and
the query's own, `dam_vllm.masks.rule.token_mask`); serving by pages reads more.
"""

import numpy as np
import torch

from dam_vllm.masks.mask_set import FloatArray, MaskSet


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
            mask = self._near(layer, first, last) if part == 0 else self._far(layer, first, last)
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

    def _near(self, layer: int, start: int, stop: int) -> np.ndarray:
        """True mask's rows start..stop-1, bool [heads, rows, stop]; unpacks only these."""
        rows = np.arange(start, stop)
        first, last = start * (start + 1) // 2, stop * (stop + 1) // 2
        packed = self._masks.true_bits[layer][:, first // 8 : -(-last // 8)]
        bits = np.unpackbits(packed, axis=-1).view(bool)[:, first % 8 :]
        mask = np.zeros((self._masks.heads, len(rows), stop), dtype=bool)
        lower = np.arange(stop)[None] <= rows[:, None]
        mask[:, lower] = bits[:, : last - first]
        return _guaranteed(mask, rows)

    def _far(self, layer: int, start: int, stop: int) -> np.ndarray:
        """Extended mask's rows start..stop-1, bool [heads, rows, stop]."""
        masks, rows, keys = self._masks, np.arange(start, stop), np.arange(stop)
        distance = rows[:, None] - keys[None]
        padded = np.zeros((2, masks.heads, stop), dtype=bool)
        reach = min(masks.reach, stop)
        padded[0, :, :reach] = masks.columns[layer][:, :reach]
        padded[1, :, :reach] = masks.diagonals[layer][:, :reach]
        seen = padded[0][:, None] | padded[1][:, np.maximum(distance, 0)]
        return _guaranteed(seen & (distance >= 0), rows)


def _guaranteed(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    mask[:, :, 0] = True
    mask[:, np.arange(len(rows)), rows] = True
    return mask
