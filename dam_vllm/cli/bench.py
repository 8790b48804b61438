"""`dam-vllm bench kernel|scoring|plan|e2e|memory|all`: figures beside a peer in the same run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure speed beside a peer in the same run.", no_args_is_help=True)

EAGER = ("--enforce-eager",)
LENGTHS = "1024,2048,4096,8192,16384"
KERNEL_LENGTHS, PAGES, DENSITIES = "4096,8192,16384", "32,128", "0.05,0.1,0.2"
HEAD_SIZES, SCORING_LENGTHS, RANKS = "32,64,128", "16384", "16,32"
PAGE, WINDOW, HEAD_SIZE, ROUNDS, FLEX_UP_TO = 128, 513, 64, 3, 8192
FILE_WIDTH = 130  # where output goes to a file, no column needs to be cut

Json = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")]
Page = Annotated[int, typer.Option(help="Tokens a page.")]
Window = Annotated[int, typer.Option(help="Latest tokens that every head reads.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each peer; the median counts.")]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="Serve without torch.compile.")]
Crossover = Annotated[bool, typer.Option("--crossover", help="Measure with dense_below 0 too.")]


@dataclass(frozen=True)
class Benchmark:
    """What a command measures.

    Attributes:
        title: of its table.
        notes: below the table: targets and conditions.
        total: steps of its progress bar.
        run: measures; called with the function that advances the bar.
    """

    title: str
    notes: str
    total: int
    run: Callable[[Callable[[], None]], list[dict[str, Any]]]


@app.command()
def kernel(
    lengths: Lengths = KERNEL_LENGTHS,
    pages: Annotated[str, typer.Option(help="Page sizes, comma-separated.")] = PAGES,
    densities: Annotated[str, typer.Option(help="Wanted densities.")] = DENSITIES,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_size: Annotated[int, typer.Option(min=32, help="Channels a head.")] = 64,
    flex_up_to: Annotated[
        int, typer.Option(help="Longest prompt for flex_attention; 0 leaves it out.")
    ] = FLEX_UP_TO,
    rounds: Rounds = 5,
    json: Json = None,
) -> None:
    """One layer's attention of a whole prompt: dam, dense CPU_ATTN, torch flex_attention."""
    shape = (heads, kv_heads, head_size)
    _finish([_kernel(lengths, pages, densities, shape, flex_up_to, rounds)], json)


@app.command()
def scoring(
    head_sizes: Annotated[str, typer.Option(help="Channels a head.")] = HEAD_SIZES,
    lengths: Lengths = SCORING_LENGTHS,
    pages: Annotated[str, typer.Option(help="Page sizes, comma-separated.")] = PAGES,
    ranks: Annotated[str, typer.Option(help="Leading channels that score.")] = RANKS,
    group: Annotated[int, typer.Option(min=1, help="Query heads a KV head.")] = 4,
    rounds: Rounds = 5,
    json: Json = None,
) -> None:
    """Choosing pages by token scores, against the dense attention that it replaces."""
    _finish([_scoring(head_sizes, lengths, pages, ranks, group, rounds)], json)


@app.command()
def plan(
    page: Page = PAGE,
    window: Window = WINDOW,
    rounds: Rounds = ROUNDS,
    enforce_eager: Eager = False,
    json: Json = None,
) -> None:
    """The step's plan as a share of a 16k prefill and of decoding 8 requests at 4k."""
    _finish([_plan(page, window, rounds, enforce_eager)], json)


@app.command()
def e2e(
    lengths: Lengths = LENGTHS,
    page: Page = PAGE,
    window: Window = WINDOW,
    rounds: Rounds = ROUNDS,
    head_size: Annotated[int, typer.Option(min=32, help="Channels a head.")] = HEAD_SIZE,
    dynamic: Annotated[
        int, typer.Option(min=0, help="KV heads of 8 that choose as many tokens more.")
    ] = 0,
    crossover: Crossover = False,
    enforce_eager: Eager = False,
    json: Json = None,
) -> None:
    """Time to the first and to each later token over HTTP, stock `vllm serve` and dam in turn."""
    heads = (head_size, dynamic)
    _finish([_e2e(lengths, page, window, heads, rounds, crossover, enforce_eager)], json)


@app.command()
def memory(
    masks: Annotated[
        Path | None, typer.Option(help="Masks for the demo model, which is left out without.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Image of the pages held by tokens.")] = None,
    json: Json = None,
) -> None:
    """Requests that fit into the KV cache, pages held, and throughput, dense against dam."""
    _finish([_memory(masks, plot)], json)


@app.command(name="all")
def every(json: Json = None) -> None:
    """All with their defaults, and the crossover; about half an hour."""
    benchmarks = [
        _kernel(KERNEL_LENGTHS, PAGES, DENSITIES, (32, 8, 64), FLEX_UP_TO, 5),
        _scoring(HEAD_SIZES, SCORING_LENGTHS, PAGES, RANKS, 4, 5),
        _plan(PAGE, WINDOW, ROUNDS, False),
        _e2e(LENGTHS, PAGE, WINDOW, (HEAD_SIZE, 0), ROUNDS, True, False),
        _memory(None, None),
    ]
    _finish(benchmarks, json)


def _kernel(
    lengths: str,
    pages: str,
    densities: str,
    heads: tuple[int, int, int],
    flex_up_to: int,
    rounds: int,
) -> Benchmark:
    from dam_vllm.bench import kernel
    from dam_vllm.bench.options import densities_option, heads_option, lengths_option, pages_option

    tokens, page_sizes = lengths_option(lengths, 128, 65536), pages_option(pages)
    wanted = densities_option(densities)
    heads_option(*heads)
    return Benchmark(
        f"attention of a prefill, one layer, bf16, {heads[0]} heads, {heads[1]} KV heads, "
        f"head size {heads[2]}",
        kernel.TARGETS,
        len(tokens) * len(page_sizes) * len(wanted),
        lambda advance: kernel.measure(
            heads, tokens, page_sizes, wanted, flex_up_to, rounds, advance
        ),
    )


def _scoring(
    head_sizes: str, lengths: str, pages: str, ranks: str, group: int, rounds: int
) -> Benchmark:
    from dam_vllm.bench import scoring
    from dam_vllm.bench.options import channels_option, lengths_option, pages_option

    sizes = channels_option(head_sizes, "--head-sizes", 32)
    channels = channels_option(ranks, "--ranks", 1)
    tokens, page_sizes = lengths_option(lengths, 128, 65536), pages_option(pages)
    cases = [(size, rank) for size in sizes for rank in channels if rank <= size]
    return Benchmark(
        f"choosing pages in a prefill, one layer, bf16, {group} query heads a KV head, "
        f"{scoring.CHOSEN} tokens chosen",
        scoring.TARGETS,
        len(cases) * len(tokens) * len(page_sizes),
        lambda advance: scoring.measure(
            sizes, tokens, page_sizes, channels, group, rounds, advance
        ),
    )


def _plan(page: int, window: int, rounds: int, eager: bool) -> Benchmark:
    from dam_vllm.bench import plan
    from dam_vllm.bench.options import pages_option, window_option

    pages_option(str(page), "--page")
    window_option(window)
    return Benchmark(
        f"the step's plan, 4 layers, page {page}, first token and window of {window}",
        plan.TARGETS,
        2,
        lambda advance: plan.measure(page, window, rounds, EAGER if eager else (), advance),
    )


def _e2e(
    lengths: str,
    page: int,
    window: int,
    heads: tuple[int, int],
    rounds: int,
    crossover: bool,
    eager: bool,
) -> Benchmark:
    from dam_vllm.bench import e2e
    from dam_vllm.bench.model import LONG
    from dam_vllm.bench.options import (
        dynamic_option,
        heads_option,
        lengths_option,
        pages_option,
        window_option,
    )
    from dam_vllm.bench.serving import Setup

    tokens = lengths_option(lengths, 128, 32768)
    pages_option(str(page), "--page")
    window_option(window)
    head_size, dynamic = heads
    heads_option(LONG.heads, LONG.kv_heads, head_size)
    dynamic_option(dynamic, LONG.kv_heads)
    shape = replace(LONG, head_size=head_size)
    arguments = EAGER if eager else ()
    setup = Setup(shape, max(tokens) + 128, page, window, arguments, dynamic)
    choosing = f", {dynamic} KV heads choose" if dynamic else ""
    return Benchmark(
        f"over HTTP, {shape.describe()}, page {page}, first token and window of {window}{choosing}",
        e2e.TARGETS,
        1 + len(tokens),
        lambda advance: e2e.measure(setup, tokens, rounds, crossover, advance),
    )


def _memory(masks: Path | None, plot: Path | None) -> Benchmark:
    from dam_vllm.bench import memory
    from dam_vllm.bench.options import file_option, image_option

    file_option(masks, "--masks")
    image_option(plot, "--plot")
    return Benchmark(
        f"KV memory: {memory.SHAPE.describe()}, page {memory.PAGE}, chunks of {memory.CHUNK}, "
        f"{memory.SINKS} sinks, window of {memory.WINDOW}",
        memory.TARGETS,
        memory.total(masks),
        lambda advance: memory.measure(masks, plot, advance),
    )


def _finish(benchmarks: Sequence[Benchmark], json: Path | None) -> None:
    """Runs benchmarks, prints each one's table and keeps the file up to date."""
    from rich.console import Console

    from dam_vllm.bench.e2e import crossover_length
    from dam_vllm.bench.machine import describe, machine
    from dam_vllm.bench.report import progress, table
    from dam_vllm.files import write_json

    console, found = Console(), machine()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        with progress(console, benchmark.title, benchmark.total) as advance:
            new = benchmark.run(advance)
        console.print(table(new, benchmark.title, f"{benchmark.notes}\n{describe(found)}"))
        rows += new
        if json is not None:
            write_json(json, {"machine": found, "rows": rows})
    if any(row.get("dense_below") == 0 for row in rows):
        length = crossover_length(rows)
        console.print(f"crossover: {'not reached' if length is None else f'{length} tokens'}")
