"""Draws what a fit could choose from: density against loss, and the point that it took."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


def plot_curve(fit: dict[str, Any], path: Path) -> None:
    """Draws the curve that a fit stored in the mask file.

    Args:
        fit: the header's parameter "fit": its "curve" is a list of points with "density" and
            "loss", its "chosen" one of them.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    points = sorted(fit["curve"], key=lambda point: float(point["density"]))
    chosen = fit["chosen"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(
        [point["density"] for point in points],
        [point["loss"] for point in points],
        marker=".",
        linewidth=0.8,
    )
    axes.plot(chosen["density"], chosen["loss"], "o", color="tab:red")
    axes.set_title(f"taken: density {chosen['density']:.3f}, loss {chosen['loss']:.3f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"density at {max(fit['lengths'])} tokens")
    axes.set_ylabel("context-aware loss")
    axes.grid(linewidth=0.3)
    try:
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
