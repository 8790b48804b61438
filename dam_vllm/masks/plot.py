"""Draws the masks of all heads: layers down, query heads across."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dam_vllm.masks.extension import token_mask
from dam_vllm.masks.mask_set import FloatArray, MaskSet

MAX_CELLS = 128
MAX_ROWS = 16
"""Rows of a cell that are looked at; they lie evenly in a cell that has more."""
INCHES = 1.5


def plot_masks(masks: MaskSet, path: Path) -> None:
    """Draws every head's mask up to `plot_end`; a line marks where the true mask ends.

    A cell's darkness is the share of its pairs that are attended, on a root scale, so that
    thin columns and diagonals stay visible.

    Args:
        masks: what to draw.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    layers = [index for index, kind in enumerate(masks.header.layer_types) if kind == "full"]
    size = (INCHES * masks.heads + 1, INCHES * len(layers) + 1.2)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(layers), masks.heads, squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        for head, (axes, image) in enumerate(zip(row, shares(masks, layer), strict=True)):
            _draw(axes, np.sqrt(image), masks.pcl, plot_end(masks))
            if layer == layers[0]:
                axes.set_title(f"head {head}")
            if head == 0:
                axes.set_ylabel(f"layer {layer}")
    figure.suptitle(f"Attended pairs up to {plot_end(masks)} tokens (line: PCL {masks.pcl})")
    figure.supxlabel("key position")
    figure.supylabel("query position")
    figure.savefig(path, dpi=110)


def plot_end(masks: MaskSet) -> int:
    """Tokens that are drawn: twice the PCL, or the reach where it is more."""
    return max(2 * masks.pcl, masks.reach)


def shares(masks: MaskSet, layer: int) -> FloatArray:
    """Share of attended pairs in cells of a layer's masks up to `plot_end`.

    Args:
        masks: the mask set.
        layer: global layer index.

    Returns:
        float32 [heads, cells, cells], at most MAX_CELLS cells a side.
    """
    end = plot_end(masks)
    side = -(-end // MAX_CELLS)
    cells = -(-end // side)
    near = token_mask(masks, layer, 0, masks.pcl)
    result = np.zeros((masks.heads, cells, cells), dtype=np.float32)
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
        result[:, cell] = seen.reshape(masks.heads, count, cells, side).mean(axis=(1, 3))
    return result


def _draw(axes: Axes, image: FloatArray, pcl: int, end: int) -> None:
    axes.imshow(image, cmap="Blues", vmin=0, vmax=1, extent=(0, end, end, 0))
    axes.plot([0, pcl], [pcl, pcl], color="tab:red", linewidth=0.8)
    axes.set_xticks([0, pcl])
    axes.set_yticks([0, pcl])
    axes.tick_params(labelsize=6)
