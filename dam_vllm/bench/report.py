"""Rows to a table on the terminal; a progress bar with the time left."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = dict[str, Any]
# The table's title says the benchmark; its footnotes say what failed; rounds are for files.
NO_COLUMNS = ("bench", "failed", "each_round")


def table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """A table with one column for each key of the rows; missing values are "-".

    Args:
        rows: flat rows.
        title: what was measured.
        caption: machine, targets and footnotes.

    Returns:
        The table.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NO_COLUMNS))
    result = Table(title=title, caption=caption, caption_justify="left")
    for name in names:
        text = all(isinstance(row.get(name, ""), str) for row in rows)
        result.add_column(name.replace("_", " "), justify="left" if text else "right")
    for row in rows:
        result.add_row(*(cell(row.get(name)) for name in names))
    return result


def cell(value: object) -> str:
    """A value to four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar with the time left.

    Args:
        console: where to.
        title: what is under way.
        total: how many advances there will be.

    Yields:
        The function that advances the bar by one.
    """
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
