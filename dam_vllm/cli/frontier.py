"""What a fitted mask file could be served as: a table of its frontier."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from dam_vllm.masks.mask_set import MaskSet


def frontier_rows(masks: "MaskSet") -> list[dict[str, Any]]:
    """Points from cheapest to most careful, as JSON values; none without a frontier."""
    import numpy as np

    from dam_vllm.masks.frontier_arrays import MEASURES
    from dam_vllm.masks.mask_set import HeadMode

    found, frontier = [], masks.frontier
    if frontier is None:
        return []
    full = np.array([kind == "full" for kind in masks.header.layer_types])
    for point, modes in enumerate(frontier.modes[:, full]):
        measures = {name: round(float(getattr(frontier, name)[point]), 5) for name in MEASURES}
        counts = {mode.name.lower(): int((modes == mode).sum()) for mode in HeadMode}
        tails = int(frontier.tails[point][full].sum())
        found.append(measures | counts | {"tails": tails})
    return found


def print_frontier(console: "Console", rows: list[dict[str, Any]]) -> None:
    """Draws the table, if there are any points."""
    from rich.table import Table

    if not rows:
        return
    table = Table(title="frontier: what target_density and target_error choose from")
    for name in rows[0]:
        table.add_column({"kl": "KL", "top1": "same best token"}.get(name, name), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value)
                        for value in row.values()))  # fmt: skip
    console.print(table)
