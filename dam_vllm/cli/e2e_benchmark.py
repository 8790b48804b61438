"""`dam-vllm bench e2e`: its options, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dam_vllm.bench.model import MODELS, Model
from dam_vllm.cli.benchmarks import EAGER, Benchmark
from dam_vllm.options import PAGE, OptionError

LONGEST, ROOM, WIDTH = 2**20, 128, 220
CPU_CONCURRENCY, GPU_CONCURRENCY = "1", "1,4,16"
MODEL, LENGTHS, WINDOW, ROUNDS = "long", "1024,2048,4096,8192,16384", 513, 3


@dataclass(frozen=True)
class E2eOptions:
    """Options of `bench e2e`; None stands for the machine's default, or for leaving it out."""

    model: str = MODEL
    lengths: str = LENGTHS
    concurrency: str | None = None
    page: int | None = None
    window: int = WINDOW
    density: float | None = None
    masks: Path | None = None
    head_size: int | None = None
    layers: int | None = None
    dynamic: int = 0
    rounds: int = ROUNDS
    crossover: bool = False
    eager: bool = False


def e2e(options: E2eOptions) -> Benchmark:
    """Requests over HTTP."""
    import torch

    from dam_vllm.bench import e2e
    from dam_vllm.bench.checks import counts_option, lengths_option
    from dam_vllm.bench.servers import Setup, free_memory, in_turns

    usual = GPU_CONCURRENCY if torch.cuda.is_available() else CPU_CONCURRENCY
    tokens = lengths_option(options.lengths, 128, LONGEST)
    concurrencies = counts_option(options.concurrency or usual, "--concurrency")
    model = _model(options)
    masks, page = _check_masks(options), _page(options)
    setup = Setup(
        model, max(tokens) + ROOM, page, options.window, max(concurrencies),
        (*(EAGER if options.eager else ()), e2e.STREAM), options.dynamic, options.density,
        options.masks,
    )  # fmt: skip
    loads = [e2e.load_of(model, length, count) for length in tokens for count in concurrencies]
    changes = (("layers", options.layers), ("head size", options.head_size))
    name = ", ".join([options.model, *(f"{what} {count}" for what, count in changes if count)])
    groups = in_turns(setup, e2e.peers_of(options.crossover), free_memory())
    alone = "" if len(groups) == 1 else ", one server after the other"
    return Benchmark(
        f"over HTTP, {name}: {model.describe()}, page {page}, {masks}{alone}",
        e2e.TARGETS,
        len(groups) * (1 + len(loads)),
        lambda advance: e2e.measure(name, setup, loads, options.rounds, groups, advance),
        crossover,
        width=WIDTH,
    )


def _model(options: E2eOptions) -> Model:
    """The model's shape."""
    from dam_vllm.bench.checks import dynamic_option, heads_option

    if options.model not in MODELS:
        raise OptionError(f"--model is {options.model!r}: must be one of {', '.join(MODELS)}")
    found = MODELS[options.model]
    size, layers = options.head_size or found.head_size, options.layers or found.layers
    heads_option(found.heads, found.kv_heads, size)
    dynamic_option(options.dynamic, found.kv_heads)
    return replace(found, head_size=size, layers=layers)


def _check_masks(options: E2eOptions) -> str:
    """What the heads read, in words."""
    from dam_vllm.bench.checks import densities_option, file_option, window_option

    window_option(options.window)
    if options.masks is not None:
        file_option(options.masks, "--masks")
        if options.density is not None or options.dynamic or options.window != WINDOW:
            raise OptionError(
                "--masks says what every head reads: leave out --density, --dynamic and --window"
            )
        return f"masks {options.masks}"
    choosing = f", {options.dynamic} KV heads choose" if options.dynamic else ""
    if options.density is None:
        return f"first token and window of {options.window}{choosing}"
    if options.window != WINDOW:
        raise OptionError("--density is in place of --window: leave out one of them")
    densities_option(str(options.density), "--density")
    return f"pages at random distances, density {options.density} at the longest{choosing}"


def _page(options: E2eOptions) -> int:
    """Tokens a page: the option, else those of the masks' fit, as in serving."""
    from dam_vllm.bench.checks import pages_option
    from dam_vllm.masks.file import load_mask_set

    page, told = options.page, "--page"
    if page is None and options.masks is not None:
        page = load_mask_set(options.masks).header.fitted_page
        told = f"the page that --masks {str(options.masks)!r} was fitted for"
    page = PAGE if page is None else page
    pages_option(str(page), told)
    return page


def crossover(rows: Sequence[dict[str, Any]]) -> str:
    """The least length from which on sparse attention pays, in words; nothing if not asked for."""
    from dam_vllm.bench.e2e import crossover_length

    if not any(row.get("dense_below") == 0 for row in rows):
        return ""
    length = crossover_length(rows)
    return f"crossover: {'not reached' if length is None else f'{length} tokens'}"
