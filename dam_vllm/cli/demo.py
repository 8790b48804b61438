"""`dam-vllm demo`: the whole way once, on the packaged model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dam_vllm.cli.program import PROGRESS, Quiet, plain_console

if TYPE_CHECKING:
    from dam_vllm.demo.run import Row


def demo(
    where: Annotated[
        bool, typer.Option("--where", help="Only print the folder of the demo model.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Questions a length.")] = 20,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2048,4096,8192",
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for masks and picture.")] = Path("out/demo"),
    quiet: Quiet = False,
) -> None:
    """Serves the demo model dense, with static masks and with fitted ones, and asks all three.

    The static masks are the paper's, calibrated now; the fitted ones come with the model.
    """
    from dam_vllm.demo import model_dir
    from dam_vllm.options import MASKS_IN_MODEL

    if where:
        typer.echo(model_dir())
        return
    from rich.progress import Progress

    from dam_vllm.demo.run import serve_and_ask
    from dam_vllm.masks.file import load_mask_set
    from dam_vllm.masks.plots import plot_masks

    sizes = _lengths(lengths)
    console = plain_console()
    masks = {"static (paper)": _calibrate(output), "fitted": model_dir() / MASKS_IN_MODEL}
    for name, file in masks.items():
        plot_masks(load_mask_set(file), output / f"{name.split()[0]}.png")
    with Progress(console=PROGRESS) as bar:
        total = (1 + len(masks)) * samples * len(sizes)
        task = bar.add_task("asking three servers over HTTP", total=total)
        rows = serve_and_ask(masks, sizes, samples, seed, lambda: bar.advance(task))
    _print(console, rows)
    for name, file in masks.items():
        picture = output / f"{name.split()[0]}.png"
        console.print(f"{name} masks: {file}, picture: {picture}", soft_wrap=True)


def _lengths(text: str) -> list[int]:
    from dam_vllm.demo.run import MAX_LENGTH, REPLY_TOKENS
    from dam_vllm.options import OptionError

    # The chat template adds a few tokens to the prompt.
    most = MAX_LENGTH - REPLY_TOKENS - 16
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(256 <= value <= most for value in values):
        raise OptionError(
            f"--lengths is {text!r}, must be numbers from 256 to {most}, e.g. 512,4096"
        )
    return values


def _calibrate(output: Path) -> Path:
    from dam_vllm.cli.calibrate import calibrate
    from dam_vllm.demo import model_dir

    folder = model_dir().parent
    masks = output / "static.safetensors"
    output.mkdir(parents=True, exist_ok=True)
    calibrate(
        model=str(folder / "model"),
        data=str(folder / "texts.jsonl"),
        output=masks,
        config=[str(folder / "paper.yaml")],
    )
    return masks


def _print(console: "object", rows: "list[Row]") -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    table = Table(title="line retrieval over HTTP (exact match)")
    for column in ("masks", "tokens", "accuracy", "density", "TTFT", "dense TTFT / TTFT"):
        table.add_column(column, justify="left" if column == "masks" else "right")
    for row in rows:
        table.add_row(
            row.masks,
            str(row.tokens),
            f"{row.accuracy:.2f}",
            f"{row.density:.3f}",
            f"{row.seconds:.2f} s",
            f"{row.ratio:.2f}",
        )
    console.print(table)
