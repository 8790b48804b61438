"""Masks as pictures: the share of attended pairs in each cell of a grid."""

import numpy as np

from dam_vllm.masks.mask_set import FloatArray, MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.rule import token_mask

MAX_CELLS = 128
MAX_ROWS = 16
"""Rows of a cell that are looked at; they lie evenly in a cell that has more."""


def plot_end(masks: MaskSet) -> int:
    """Tokens that are drawn: twice the PCL, or the reach where it is more."""
    return max(2 * masks.pcl, masks.reach)


def shares(masks: MaskSet, layer: int, together: int = 1) -> FloatArray:
    """Share of attended pairs in cells of a layer's masks up to `plot_end`.

    Args:
        masks: the mask set.
        layer: global layer index.
        together: query heads that make one picture, of pairs that any of them attends.

    Returns:
        float32 [heads / together, cells, cells], at most MAX_CELLS cells a side.
    """
    end = plot_end(masks)
    side = ceil_div(end, MAX_CELLS)
    cells = ceil_div(end, side)
    near = token_mask(masks, layer, 0, masks.pcl)
    result = np.zeros((masks.heads // together, cells, cells), dtype=np.float32)
    for cell in range(cells):
        start, stop = cell * side, min((cell + 1) * side, end)
        count = min(stop - start, MAX_ROWS)
        seen = np.zeros((masks.heads, count, cells * side), dtype=bool)
        for slot in range(count):
            row = start + slot * (stop - start) // count
            if row < masks.pcl:
                seen[:, slot, : masks.pcl] = near[:, row]
            else:
                seen[:, slot, : row + 1] = token_mask(masks, layer, row, row + 1)[:, 0]
        joined = seen.reshape(-1, together, count, cells, side).any(axis=1)
        result[:, cell] = joined.mean(axis=(1, 3))
    return result
