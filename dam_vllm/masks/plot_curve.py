"""Draws what a fit could choose from: density and cost against loss, and what it took."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


def plot_curve(fit: dict[str, Any], path: Path) -> None:
    """Draws the curve that a fit stored in the mask file.

    Args:
        fit: the header's parameter "fit": its "curve" is a list of points with "density", "cost"
            (density with what scoring costs) and "loss", the dense one first; its "chosen" is
            one of them.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    points, chosen = fit["curve"], fit["chosen"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    losses = [point["loss"] for point in points]
    for name in ("density", "cost"):
        axes.plot([point[name] for point in points], losses, marker=".", linewidth=0.8, label=name)
    axes.plot(chosen["density"], chosen["loss"], "o", color="tab:red", label="taken")
    axes.set_title(f"taken: density {chosen['density']:.3f}, loss {chosen['loss']:.3f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"share of dense attention at {max(fit['lengths'])} tokens")
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("predicted KL of the next token (nats)")
    axes.grid(linewidth=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
