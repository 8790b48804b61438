"""Draws what a fit could choose from: density against loss, and what it took."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


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
