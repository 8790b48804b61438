"""Draws accuracy by length and depth: masks down, tasks across."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dam_vllm.evaluation.results import DEPTHS, Row

INCHES = 2.2
COLOURS = "RdYlGn"


def heat_map(rows: Sequence[Row], path: Path) -> None:
    """Draws one panel for each subject and task.

    Args:
        rows: of `score_rows`.
        path: image file; its suffix chooses the format.
    """
    names, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("masks", "task"))
    size = (INCHES * len(tasks) + 1.5, INCHES * len(names) + 0.8)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(names), len(tasks), squeeze=False)
    for line, name in zip(grid, names, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            own = [row for row in rows if (row["masks"], row["task"]) == (name, task)]
            _draw(axes, own)
            axes.set_title(f"{task}\n{name}" if len(tasks) > 1 else name, fontsize=8)
    figure.supxlabel("prompt length in tokens")
    figure.supylabel("depth of the answer")
    colours = ScalarMappable(Normalize(0, 1), COLOURS)
    figure.colorbar(colours, ax=grid, label="accuracy")
    figure.savefig(path, dpi=110)


def accuracies(rows: Sequence[Row]) -> np.ndarray:
    """Accuracy of one panel.

    Args:
        rows: one subject's and task's, one a length.

    Returns:
        float [DEPTHS, len(rows)], NaN where a bin has no question; [1, len(rows)] where answers
        have no depth.
    """
    columns = [row["depths"] or [row["accuracy"]] for row in rows]
    return np.array(columns, dtype=float).T


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    image = accuracies(rows)
    axes.imshow(image, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    for (depth, length), value in np.ndenumerate(image):
        if np.isfinite(value):
            axes.text(length, depth, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(rows)), [str(row["length"]) for row in rows], fontsize=7)
    bins = len(image)
    labels = [f"{index / bins:.1f}-{(index + 1) / bins:.1f}" for index in range(DEPTHS)][:bins]
    axes.set_yticks(range(bins), labels if bins == DEPTHS else ["any"], fontsize=7)
