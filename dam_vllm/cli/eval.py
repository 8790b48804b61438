"""`dam-vllm eval`: questions, perplexity and agreement through vLLM, masks beside dense."""

import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dam_vllm.cli.program import INTERRUPTED, PROGRESS, Quiet, plain_console

if TYPE_CHECKING:
    from rich.console import Console

    from dam_vllm.evaluation.prepare import Job
    from dam_vllm.evaluation.settings import Place
    from dam_vllm.evaluation.state import State

CELL_WIDTH, LEFT_WIDTH = 28, 22
MANY = "--masks"


class ManyMasks(TyperCommand):
    """A command whose option `--masks` takes all values up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option before each of its values, and leaves the rest to click."""
        return super().parse_args(ctx, spread(args, MANY))


def spread(args: Sequence[str], option: str) -> list[str]:
    """Turns `--masks A B` into `--masks A --masks B`.

    Args:
        args: a command line.
        option: the option that takes several values.

    Returns:
        The command line with one value an option.
    """
    result: list[str] = []
    inside = False
    for argument in args:
        if argument.startswith("-"):
            inside = argument == option
        elif inside and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result


ModelArgument = Annotated[str, typer.Argument(help="Folder or Hugging Face Hub id of the model.")]
MasksOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE...",
        help="Mask files, folders or Hub ids to compare, one or more; without, dense alone.",
    ),
]
TasksOption = Annotated[str, typer.Option(help="Comma-separated, among these.")]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        help="Prompt lengths in tokens, comma-separated; by default those of 2048,4096,8192 "
        "that the model allows."
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Questions a task and length.")]
SeedOption = Annotated[int, typer.Option(help="Of the questions.")]
KeysOption = Annotated[
    str, typer.Option(help="What records are found by: pair, code, number or syllables.")
]
CompletionOption = Annotated[
    bool,
    typer.Option(
        "--completion",
        help="Ask for the end of a text, which no fit of a model with a chat template sees.",
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        help='Text (plain, or .jsonl with "text") for perplexity and agreement with dense.'
    ),
]
WindowsOption = Annotated[
    int | None, typer.Option(min=1, help="Pieces of the text at each length (default: 4).")
]
StreamingOption = Annotated[
    bool,
    typer.Option(
        help="Compare each file with sinks and a window of the same density, where that is "
        "below 1; one more server for each length."
    ),
]
DenseBelowOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Query positions below it attend densely. Serving has a higher default; 0 "
        "judges the masks alone.",
    ),
]
PageOption = Annotated[
    int | None,
    typer.Option(help="Tokens a KV-cache page (default: those of the masks' fit, else 128)."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")]
PlotOption = Annotated[
    Path | None, typer.Option(help="Draw accuracy by length and depth (.png, .pdf, .svg).")
]
WriteOption = Annotated[
    bool, typer.Option("--write", help="Store the result in the mask files, as their report.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Ask everything again, whatever is stored.")
]
ServeArgsOption = Annotated[str, typer.Option(help="Further arguments of `vllm serve`, in quotes.")]


def evaluate(
    model: ModelArgument,
    masks: MasksOption = None,
    tasks: TasksOption = "lines,kv,needle,tracking,words",
    lengths: LengthsOption = None,
    samples: SamplesOption = 20,
    seed: SeedOption = 0,
    text: TextOption = None,
    windows: WindowsOption = None,
    streaming: StreamingOption = True,
    dense_below: DenseBelowOption = 0,
    page: PageOption = None,
    json: JsonOption = None,
    plot: PlotOption = None,
    write: WriteOption = False,
    fresh: FreshOption = False,
    serve_args: ServeArgsOption = "",
    keys: KeysOption = "pair",
    completion: CompletionOption = False,
    quiet: Quiet = False,
) -> None:
    """Asks a model questions over long texts through vLLM, with each mask file and without.

    Servers run one after another. Every answer is stored at once: after Ctrl-C the same command
    goes on, and reports stored times for what it does not ask again.
    """
    from transformers.utils import logging

    from dam_vllm.evaluation.checks import output_options
    from dam_vllm.evaluation.prepare import Options, prepare
    from dam_vllm.evaluation.state import State
    from dam_vllm.options import mask_file

    logging.disable_progress_bar()
    places = masks or []
    files = [mask_file(place) for place in places]
    output_options(json, plot, write, places)
    options = Options(
        model, files, tasks, lengths, samples, seed, page, dense_below, streaming, text, windows,
        serve_args, keys, completion,
    )  # fmt: skip
    job = prepare(options)
    if fresh:
        shutil.rmtree(job.folder, ignore_errors=True)
    state = State(job.folder)
    _report(job, state, _ask(job, state), json, plot, write)


def _ask(job: "Job", state: "State") -> "list[Place]":
    """Measures, and says where an interrupted evaluation goes on."""
    try:
        return _measure(job, state)
    except KeyboardInterrupt:
        typer.echo(
            f"Stopped; answers so far lie in {job.folder}. The same command goes on from there.",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def _measure(job: "Job", state: "State") -> "list[Place]":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from dam_vllm.evaluation.runner import Evaluation
    from dam_vllm.evaluation.subjects import starter
    from dam_vllm.questions.prompting import prompting

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=PROGRESS) as bar, _sigterm_as_interrupt():
        task = bar.add_task("", total=None)

        def progress(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        asked = prompting(job.tokenizer, job.settings.completion)
        start = starter(job.settings, asked.chat)
        return Evaluation(job.settings, job.tokenizer, state, start, progress).run(job.masks)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM stop the server too, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _report(
    job: "Job",
    state: "State",
    places: "list[Place]",
    json: Path | None,
    plot: Path | None,
    write: bool,
) -> None:
    """Prints tables and writes what was asked for."""
    from dam_vllm.evaluation.results import agreement_rows, results, score_rows, worst
    from dam_vllm.evaluation.show import agreement_table, score_table, worst_line
    from dam_vllm.files import write_json

    rows = score_rows(job.settings, state, places)
    agreed = agreement_rows(job.settings, state, places)
    losses = worst(rows, [subject.name for subject in job.masks])
    console = plain_console()
    _widen(console, len({row["masks"] for row in rows}))
    console.print(score_table(rows))
    if agreed:
        console.print(agreement_table(agreed))
    for loss in losses:
        console.print(worst_line(loss), soft_wrap=True)
    if json is not None:
        write_json(json, results(job.settings, rows, agreed, losses))
    if plot is not None:
        from dam_vllm.evaluation.heat_map import heat_map

        plot.parent.mkdir(parents=True, exist_ok=True)
        heat_map(rows, plot)
    if write:
        _write(job, rows, agreed)


def _widen(console: "Console", subjects: int) -> None:
    """Where output goes to a file, no column needs to be cut."""
    if not console.is_terminal:
        console.width = max(console.width, LEFT_WIDTH + CELL_WIDTH * subjects)


def _write(job: "Job", rows: list[dict[str, Any]], agreed: list[dict[str, Any]]) -> None:
    """Stores each mask file's report in it."""
    from dam_vllm.evaluation.results import quality
    from dam_vllm.masks.file import load_mask_set, save_mask_set

    for subject in job.masks:
        assert subject.file is not None
        masks = load_mask_set(subject.file)
        report = quality(job.settings, rows, agreed, subject.name)
        header = masks.header.model_copy(update={"quality": report})
        save_mask_set(replace(masks, header=header), subject.file)
        typer.echo(f"stored the report in {subject.file}")
