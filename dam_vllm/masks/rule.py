"""The mask at any length: true mask below the PCL, kept columns and diagonals beyond it.

This is the rule itself at token granularity, written plainly. Serving reads pages
(`dam_vllm.masks.page_tables`); tests and the naive kernel hold them against this.
"""

import numpy as np

from dam_vllm.masks.mask_set import BoolArray, MaskSet
from dam_vllm.masks.rounding import ceil_div


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
        result[:, : near - start, :near] = _true_rows(masks, layer, start, near)
    if near < stop:
        distance = np.arange(near, stop)[:, None] - np.arange(stop)
        column, diagonal = (_padded(bits[layer], stop) for bits in (masks.columns, masks.diagonals))
        seen = column[:, None] | diagonal[:, np.maximum(distance, 0)]
        result[:, near - start :] = seen & (distance >= 0)
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


def _true_rows(masks: MaskSet, layer: int, start: int, stop: int) -> BoolArray:
    """The true mask's rows start..stop-1, bool [heads, rows, stop]; unpacks only these."""
    rows = np.arange(start, stop)
    first, last = start * (start + 1) // 2, stop * (stop + 1) // 2
    packed = masks.true_bits[layer][:, first // 8 : ceil_div(last, 8)]
    bits = np.unpackbits(packed, axis=-1).view(bool)[:, first % 8 :]
    mask = np.zeros((masks.heads, len(rows), stop), dtype=bool)
    mask[:, np.arange(stop)[None] <= rows[:, None]] = bits[:, : last - first]
    return mask


def _padded(bits: BoolArray, size: int) -> BoolArray:
    """Bits [heads, reach] cut or padded with False to [heads, size]."""
    kept = bits[:, :size]
    return np.pad(kept, ((0, 0), (0, size - kept.shape[1])))
