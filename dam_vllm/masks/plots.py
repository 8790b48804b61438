"""Draws the masks of all heads, what a fit could choose from, and which heads reuse whose pages."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dam_vllm.masks.mask_set import FloatArray, HeadMode, MaskSet
from dam_vllm.masks.pictures import plot_end, shares

INCHES = 1.5
Place = tuple[int, int]
MODE_COLORS = {
    HeadMode.STATIC: "gainsboro",
    HeadMode.DYNAMIC: "tab:blue",
    HeadMode.REUSE: "lightskyblue",
    HeadMode.DENSE: "dimgrey",
}


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


def picture(image: FloatArray, masks: MaskSet, title: str) -> bytes:
    """Draws one mask as `plot_masks` does.

    Args:
        image: float32 [cells, cells], see `shares`.
        masks: the mask set that it is of.
        title: of the picture.

    Returns:
        A PNG.
    """
    figure, drawn = Figure((5, 5), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    _draw(axes, np.sqrt(image), masks.pcl, plot_end(masks))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    figure.savefig(drawn, dpi=110, format="png")
    return drawn.getvalue()


def _draw(axes: Axes, image: FloatArray, pcl: int, end: int) -> None:
    axes.imshow(image, cmap="Blues", vmin=0, vmax=1, extent=(0, end, end, 0))
    axes.plot([0, pcl], [pcl, pcl], color="tab:red", linewidth=0.8)
    axes.set_xticks([0, pcl])
    axes.set_yticks([0, pcl])
    axes.tick_params(labelsize=6)


def plot_reuse(masks: MaskSet, path: Path) -> None:
    """Draws which heads reuse the pages of which: an arrow from each anchor to each follower.

    Args:
        masks: what to draw, layers down and KV heads across; a follower's square names its
            anchor's layer and KV head.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    figure = Figure((0.9 * masks.kv_heads + 2.5, 0.5 * masks.layers + 1.5), layout="constrained")
    axes = figure.subplots()
    full = np.array([kind == "full" for kind in masks.header.layer_types])[:, None]
    for mode, color in MODE_COLORS.items():
        layers, heads = np.nonzero((masks.modes == mode) & full)
        if len(layers):
            axes.scatter(heads, layers, s=300, marker="s", c=color, label=mode.name.lower())
    followers = [
        (int(layer), int(head)) for layer, head in np.argwhere(masks.modes == HeadMode.REUSE)
    ]
    anchors = sorted({masks.anchor(*follower) for follower in followers})
    for follower in followers:
        anchor = masks.anchor(*follower)
        _draw_arrow(axes, anchor, follower, f"C{anchors.index(anchor) % 10}")
    axes.set_xticks(range(masks.kv_heads))
    axes.set_yticks(range(masks.layers))
    axes.set_xlim(-0.6, masks.kv_heads - 0.4)
    axes.set_ylim(masks.layers - 0.4, -0.8)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title("Arrows: from who chooses pages to who reuses them", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, markerscale=0.5)
    figure.savefig(path, dpi=110)


def _draw_arrow(axes: Axes, anchor: Place, follower: Place, color: str) -> None:
    """An arrow between two (layer, KV head), and the anchor's name at its end."""
    arrow = {
        "arrowstyle": "-|>", "color": color, "linewidth": 0.8, "shrinkA": 8, "shrinkB": 8,
        # Curved, so that arrows over the same heads do not hide each other.
        "connectionstyle": "arc3,rad=0.15",
    }  # fmt: skip
    axes.annotate("", follower[::-1], anchor[::-1], arrowprops=arrow)
    name = f"{anchor[0]}.{anchor[1]}"
    axes.text(follower[1], follower[0], name, size=6, ha="center", va="center")


def plot_curve(fit: dict[str, Any], path: Path) -> None:
    """Draws the curves that a fit stored in the mask file.

    Args:
        fit: the header's parameter "fit": its "curves" are lists of points with "density" and
            predicted "loss", the dense one first, by how far each trusts probes of layers; its
            "proven" are points whose loss was measured, the "chosen" one among them.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    chosen, proven = fit["chosen"], fit["proven"]
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for trust, points in fit["curves"].items():
        losses = [point["loss"] for point in points]
        label = f"predicted, trust in layers {trust}"
        axes.plot([point["density"] for point in points], losses, linewidth=0.8, label=label)
    axes.plot(
        [point["density"] for point in proven], [point["loss"] for point in proven],
        "x", color="black", label="measured",
    )  # fmt: skip
    axes.plot(chosen["density"], chosen["loss"], "o", color="tab:red", label="taken")
    axes.set_title(f"taken: density {chosen['density']:.3f}, loss {chosen['loss']:.3f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"density at {max(fit['lengths'])} tokens")
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("KL of the next token (nats)")
    axes.grid(linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
