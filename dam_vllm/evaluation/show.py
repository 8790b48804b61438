"""Rows to tables on the terminal."""

from collections.abc import Sequence

from rich.table import Table

from dam_vllm.evaluation.results import Row, dense_accuracy
from dam_vllm.evaluation.settings import DENSE


def score_table(rows: Sequence[Row]) -> Table:
    """Tasks and lengths down, masks across.

    Args:
        rows: of `score_rows`.

    Returns:
        The table; a cell holds accuracy, its difference to dense, density and time.
    """
    base = dense_accuracy(rows)
    cells = {(row["task"], row["length"], row["masks"]): row for row in rows}
    names = list(dict.fromkeys(row["masks"] for row in rows))
    table = Table(
        title="exact match over HTTP",
        caption="in a cell: accuracy (difference to dense), below it density and time to the "
        f"first token; {rows[0]['samples']} questions each",
        caption_justify="left",
    )
    table.add_column("task")
    table.add_column("tokens", justify="right")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for task, length in base:
        found = [cells.get((task, length, name)) for name in names]
        shown = [_cell(row, base[task, length]) for row in found]
        table.add_row(task, str(length), *shown)
    return table


def _cell(row: Row | None, dense: float) -> str:
    if row is None:
        return "-"
    difference = "" if row["masks"] == DENSE else f" ({row['accuracy'] - dense:+.2f})"
    return f"{row['accuracy']:.2f}{difference}\n{row['density']:.3f}  {row['seconds']:.2f} s"


def agreement_table(rows: Sequence[Row]) -> Table:
    """Perplexity and agreement with dense.

    Args:
        rows: of `agreement_rows`, at least one.

    Returns:
        The table.
    """
    table = Table(
        title="agreement with full attention on the text",
        caption="KL from dense in nats a token, estimated from below by the likeliest tokens",
        caption_justify="left",
    )
    table.add_column("masks", overflow="fold")
    for name in ("tokens", "windows", "density", "perplexity", "top-1", "KL"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: row["length"]):
        table.add_row(
            row["masks"],
            str(row["length"]),
            str(row["windows"]),
            f"{row['density']:.3f}",
            f"{row['perplexity']:.4g}",
            f"{row['top1']:.4f}",
            f"{row['kl']:.4g}",
        )
    return table


def worst_line(row: Row) -> str:
    """One line about where a mask file loses most."""
    return (
        f"{row['masks']}: worst task {row['task']} at {row['length']} tokens, accuracy "
        f"{row['accuracy']:.2f}, dense {row['dense']:.2f} ({row['difference']:+.2f})"
    )
