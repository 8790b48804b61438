"""Draws the masks of all heads: layers down, query heads across."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from dam_vllm.masks.extension import token_mask
from dam_vllm.masks.mask_set import FloatArray, MaskSet

MAX_CELLS = 128
INCHES = 1.5


def plot_masks(masks: MaskSet, path: Path) -> None:
    """Draws every head's mask up to twice the PCL; a line marks where the true mask ends.

    A cell's darkness is the share of its pairs that are attended, on a root scale, so that
    thin columns and diagonals stay visible.

    Args:
        masks: what to draw.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    layers = [index for index, kind in enumerate(masks.header.layer_types) if kind == "full"]
    figure, grid = plt.subplots(
        len(layers),
        masks.heads,
        figsize=(INCHES * masks.heads + 1, INCHES * len(layers) + 1.2),
        squeeze=False,
        layout="constrained",
    )
    for row, layer in zip(grid, layers, strict=True):
        for head, (axes, image) in enumerate(zip(row, shares(masks, layer), strict=True)):
            _draw(axes, np.sqrt(image), masks.pcl)
            if layer == layers[0]:
                axes.set_title(f"head {head}")
            if head == 0:
                axes.set_ylabel(f"layer {layer}")
    figure.suptitle(f"Attended pairs up to {2 * masks.pcl} tokens (line: PCL {masks.pcl})")
    figure.supxlabel("key position")
    figure.supylabel("query position")
    try:
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def shares(masks: MaskSet, layer: int) -> FloatArray:
    """Share of attended pairs in cells of a layer's masks up to twice the PCL.

    Args:
        masks: the mask set.
        layer: global layer index.

    Returns:
        float32 [heads, cells, cells], at most MAX_CELLS cells a side.
    """
    length = 2 * masks.pcl
    side = -(-length // MAX_CELLS)
    cells = -(-length // side)
    result = np.zeros((masks.heads, cells, cells), dtype=np.float32)
    for cell in range(cells):
        start, stop = cell * side, min((cell + 1) * side, length)
        seen = np.zeros((masks.heads, stop - start, cells * side), dtype=bool)
        seen[:, :, :stop] = token_mask(masks, layer, start, stop)
        result[:, cell] = seen.reshape(masks.heads, stop - start, cells, side).mean(axis=(1, 3))
    return result


def _draw(axes: Axes, image: FloatArray, pcl: int) -> None:
    end = 2 * pcl
    axes.imshow(image, cmap="Blues", vmin=0, vmax=1, extent=(0, end, end, 0))
    axes.plot([0, pcl], [pcl, pcl], color="tab:red", linewidth=0.8)
    axes.set_xticks([0, pcl])
    axes.set_yticks([0, pcl])
    axes.tick_params(labelsize=6)
