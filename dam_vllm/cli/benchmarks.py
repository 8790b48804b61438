"""The benchmarks behind `dam-vllm bench`, their options checked, and how they are run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dam_vllm.cli.program import PROGRESS, plain_console

EAGER = ("--enforce-eager",)
FILE_WIDTH = 130  # where output goes to a file, no column needs to be cut
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """What a command measures.

    Attributes:
        title: of its table.
        notes: below the table: targets and conditions.
        total: steps of its progress bar.
        run: measures; called with the function that advances the bar.
        conclude: what follows from the rows, printed below the table.
        gpu: whether it measures a GPU.
        width: characters that its table needs.
    """

    title: str
    notes: str
    total: int
    run: Callable[[Callable[[], None]], Iterable[dict[str, Any]]]
    conclude: Callable[[Rows], str] = lambda rows: ""
    gpu: bool = False
    width: int = FILE_WIDTH


def finish(benchmarks: Sequence[Benchmark], json: Path | None) -> None:
    """Runs benchmarks, prints each one's table and keeps the file up to date row by row."""
    from dam_vllm.bench.report import progress, table
    from dam_vllm.bench.roof import gpu_machine
    from dam_vllm.files import write_json
    from dam_vllm.machine import describe, machine
    from dam_vllm.options import output_option

    output_option("--json", json)
    console = plain_console()
    found = machine()
    if any(benchmark.gpu for benchmark in benchmarks):
        found = gpu_machine() | found
    wide = console.width
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        if not console.is_terminal:
            console.width = max(wide, benchmark.width)
        new: list[dict[str, Any]] = []
        with progress(PROGRESS, benchmark.title, benchmark.total) as advance:
            for row in benchmark.run(advance):
                new.append(row)
                if json is not None:
                    write_json(json, {"machine": found, "rows": [*rows, *new]})
        rows += new
        console.print(table(new, benchmark.title, f"{benchmark.notes}\n{describe(found)}"))
        if conclusion := benchmark.conclude(new):
            console.print(conclusion, highlight=False)


def scoring(
    head_sizes: str, lengths: str, pages: str, channel_counts: str, heads_per_kv: int, rounds: int
) -> Benchmark:
    """Choosing pages."""
    from dam_vllm.bench import scoring
    from dam_vllm.bench.checks import channels_option, lengths_option, pages_option

    sizes = channels_option(head_sizes, "--head-sizes", 32)
    channels = channels_option(channel_counts, "--channels", 1)
    tokens, page_sizes = lengths_option(lengths, 128, 65536), pages_option(pages)
    cases = [(size, count) for size in sizes for count in channels if count <= size]
    return Benchmark(
        f"choosing pages in a prefill, one layer, bf16, {heads_per_kv} query heads a KV head, "
        f"top-k of {scoring.CHOSEN} tokens, top-p up to {scoring.CAP_PAGES} pages",
        scoring.TARGETS,
        len(cases) * len(tokens) * len(page_sizes),
        lambda advance: scoring.measure(
            sizes, tokens, page_sizes, channels, heads_per_kv, rounds, advance
        ),
    )


def plan(page: int, window: int, rounds: int, eager: bool) -> Benchmark:
    """A step's plan."""
    from dam_vllm.bench import plan_time
    from dam_vllm.bench.checks import pages_option, window_option

    pages_option(str(page), "--page")
    window_option(window)
    return Benchmark(
        f"the step's plan, 4 layers, page {page}, first token and window of {window}",
        plan_time.TARGETS,
        2,
        lambda advance: plan_time.measure(page, window, rounds, EAGER if eager else (), advance),
    )


def memory(masks: Path | None, plot: Path | None) -> Benchmark:
    """The KV cache."""
    from dam_vllm.bench import memory
    from dam_vllm.bench.checks import file_option, image_option

    file_option(masks, "--masks")
    image_option(plot, "--plot")
    return Benchmark(
        f"KV memory: {memory.SHAPE.describe()}, page {memory.PAGE}, chunks of {memory.CHUNK}, "
        f"{memory.SINKS} sinks, window of {memory.WINDOW}",
        memory.TARGETS,
        memory.total(masks),
        lambda advance: memory.measure(masks, plot, advance),
    )


def mass(
    model: str,
    masks: Path | None,
    text: Path,
    densities: str | None,
    length: int,
    windows: int,
    questions: int,
    estimates: str,
    period: int,
) -> Benchmark:
    """Estimates of what is not read."""
    from dam_vllm.bench import mass
    from dam_vllm.bench.checks import densities_option, estimates_option, file_option
    from dam_vllm.options import OptionError

    path = masks or Path(model) / "dam" / "masks.safetensors"
    file_option(path, "--masks")
    file_option(text, "--text")
    wanted = [None] if densities is None else densities_option(densities)
    tried = estimates_option(estimates)
    if length < mass.LEAST_TOKENS:
        raise OptionError(f"--length is {length}: must be at least {mass.LEAST_TOKENS} tokens")
    return Benchmark(
        f"what is not read: {model}, {windows} windows of {length} tokens of {text.name}, "
        f"{questions} questions a task, delta every {period} queries",
        mass.TARGETS,
        len(wanted) * len(tried),
        lambda advance: mass.measure_file(
            mass.Case(text, length, windows, questions, tried, period),
            model,
            path,
            wanted,
            advance,
        ),
    )
