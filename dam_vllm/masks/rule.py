"""The mask at any length: true mask below the PCL, kept columns and diagonals beyond it.

This is the rule itself at token granularity, written plainly. Serving reads pages
(`dam_vllm.masks.page_tables`); tests and the naive kernel hold them against this.
"""

import numpy as np

from dam_vllm.masks.mask_set import BoolArray, MaskSet


def allowed(masks: MaskSet, layer: int, start: int, stop: int) -> BoolArray:
    """Which keys the queries at positions start..stop-1 of one layer may see.

    Paper, section 3 (extended mask), with this project's reading beyond the PCL: a key is
    seen where it is a kept column (below the reach) OR lies on a kept diagonal (at a distance
    below the reach). Nothing is added to it here;
    see `token_mask` for the rows' guaranteed keys.

    Args:
        masks: the mask set.
        layer: global layer index.
        start: first query position.
        stop: one past the last query position.

    Returns:
        bool [heads, stop - start, stop], causal.
    """
    near = min(max(masks.pcl, start), stop)
    result = np.zeros((masks.heads, stop - start, stop), dtype=bool)
    if start < near:
        result[:, : near - start, :near] = masks.true_mask(layer)[:, start:near, :near]
    if near < stop:
        rows, keys = np.arange(near, stop)[:, None], np.arange(stop)[None]
        column = _lookup(masks.columns[layer], keys)
        diagonal = _lookup(masks.diagonals[layer], rows - keys)
        result[:, near - start :] = (column | diagonal) & (keys <= rows)
    return result


def token_mask(masks: MaskSet, layer: int, start: int, stop: int) -> BoolArray:
    """`allowed` with the keys that every row always sees: the first token and itself.

    Returns:
        bool [heads, stop - start, stop].
    """
    result = allowed(masks, layer, start, stop)
    result[:, :, 0] = True
    result[:, np.arange(stop - start), np.arange(start, stop)] = True
    return result


def _lookup(bits: BoolArray, index: np.ndarray) -> BoolArray:
    """Bits [heads, reach] at index [...], False outside 0..reach-1; bool [heads, ...]."""
    inside = (index >= 0) & (index < bits.shape[-1])
    return np.asarray(bits[:, np.where(inside, index, 0)] & inside)
