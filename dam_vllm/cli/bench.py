"""`dam-vllm bench kernel|tune|scoring|plan|e2e|memory|mass|all`: figures beside a peer."""

from pathlib import Path
from typing import Annotated

import typer

from dam_vllm.bench.model import MODELS
from dam_vllm.cli import benchmarks, kernel_benchmarks
from dam_vllm.cli.e2e_benchmark import (
    CPU_CONCURRENCY,
    GPU_CONCURRENCY,
    LENGTHS,
    MODEL,
    ROUNDS,
    WINDOW,
    E2eOptions,
)
from dam_vllm.cli.e2e_benchmark import e2e as e2e_benchmark
from dam_vllm.cli.kernel_benchmarks import BATCHES, CHUNKS, CPU, GPU, SPREADS, KernelOptions, Phase
from dam_vllm.cli.program import Quiet
from dam_vllm.options import PAGE

app = typer.Typer(help="Measure speed beside a peer in the same run.", no_args_is_help=True)

PAGES, HEAD_SIZES, SCORING_LENGTHS, CHANNELS = "32,128", "32,64,128", "16384", "16,32"
TUNED_SIZES, TUNED_TOKENS, TUNED_BATCH = "64,128,256", 32768, 32

Json = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")]
Page = Annotated[int, typer.Option(help="Tokens a page.")]
Window = Annotated[int, typer.Option(help="Latest tokens that every head reads.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each peer; the median counts.")]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="Serve without torch.compile.")]
Crossover = Annotated[bool, typer.Option("--crossover", help="Measure with dense_below 0 too.")]


def _defaults(field: str) -> str:
    """What `bench kernel` takes on either machine, for its help."""
    return f" [CPU: {getattr(CPU, field)}; GPU: {getattr(GPU, field)}]"


FlexUpTo = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Most tokens of all requests for flex_attention; 0 leaves it out."
        f"{_defaults('flex_up_to')}",
    ),
]
KernelRounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Measurements of each peer; the median counts. On a GPU at most so many, fewer "
        f"where they take long.{_defaults('rounds')}",
    ),
]
Fa3 = Annotated[
    Path | None,
    typer.Option(
        help="GPU: folder with vLLM's _vllm_fa3_C.abi3.so (or its .xz) and "
        "flash_attn_interface.py, for where vLLM is not installed."
    ),
]


@app.command()
def kernel(
    lengths: Annotated[
        str | None, typer.Option(help=f"Tokens of a request.{_defaults('lengths')}")
    ] = None,
    pages: Annotated[str | None, typer.Option(help=f"Page sizes.{_defaults('pages')}")] = None,
    densities: Annotated[
        str | None, typer.Option(help=f"Wanted densities.{_defaults('densities')}")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[
        str | None, typer.Option(help=f"KV heads; one number on CPU.{_defaults('kv_heads')}")
    ] = None,
    head_size: Annotated[
        int | None, typer.Option(min=32, help=f"Channels a head.{_defaults('head_size')}")
    ] = None,
    flex_up_to: FlexUpTo = None,
    rounds: KernelRounds = None,
    phase: Annotated[Phase | None, typer.Option(help="GPU: what is timed (default: all).")] = None,
    batches: Annotated[
        str | None, typer.Option(help=f"GPU: requests that decode together. [{BATCHES}]")
    ] = None,
    chunks: Annotated[
        str | None, typer.Option(help=f"GPU: new tokens of a prompt's last chunk. [{CHUNKS}]")
    ] = None,
    spreads: Annotated[
        str | None,
        typer.Option(help=f"GPU: how a density is spread over heads. [{SPREADS}]"),
    ] = None,
    fa3: Fa3 = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """One layer's attention: dam beside dense attention and torch flex_attention.

    On CPU a prompt's prefill, beside vLLM's CPU_ATTN. On a GPU prefill and decoding, dam's Triton
    kernel and FlashAttention on virtual pages, beside FlashAttention 3 and SDPA.
    """
    options = KernelOptions(
        lengths, pages, densities, heads, kv_heads, head_size, flex_up_to, rounds, phase, batches,
        chunks, spreads, fa3,
    )  # fmt: skip
    benchmarks.finish([kernel_benchmarks.kernel(options)], json)


@app.command()
def tune(
    head_sizes: Annotated[str, typer.Option(help="Channels a head.")] = TUNED_SIZES,
    page: Page = PAGE,
    tokens: Annotated[int, typer.Option(help="Length of the prompt and requests.")] = TUNED_TOKENS,
    batch: Annotated[int, typer.Option(min=1, help="Requests decoding.")] = TUNED_BATCH,
    rounds: Rounds = 10,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Block sizes of the Triton kernel for the GPU at hand, for attention/cuda/tuning.py."""
    benchmarks.finish([kernel_benchmarks.tune(head_sizes, page, tokens, batch, rounds)], json)


@app.command()
def scoring(
    head_sizes: Annotated[str, typer.Option(help="Channels a head.")] = HEAD_SIZES,
    lengths: Lengths = SCORING_LENGTHS,
    pages: Annotated[str, typer.Option(help="Page sizes, comma-separated.")] = PAGES,
    channels: Annotated[str, typer.Option(help="Leading channels that score.")] = CHANNELS,
    heads_per_kv: Annotated[int, typer.Option(min=1, help="Query heads a KV head.")] = 4,
    rounds: Rounds = 5,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Choosing pages by token scores, against the dense attention that it replaces."""
    benchmarks.finish(
        [benchmarks.scoring(head_sizes, lengths, pages, channels, heads_per_kv, rounds)], json
    )


@app.command()
def plan(
    page: Page = PAGE,
    window: Window = WINDOW,
    rounds: Rounds = ROUNDS,
    enforce_eager: Eager = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """The step's plan as a share of a 16k prefill and of decoding 8 requests at 4k."""
    benchmarks.finish([benchmarks.plan(page, window, rounds, enforce_eager)], json)


@app.command()
def e2e(
    model: Annotated[
        str,
        typer.Option(help=f"Shape, served with random weights: {', '.join(MODELS)}."),
    ] = MODEL,
    lengths: Lengths = LENGTHS,
    concurrency: Annotated[
        str | None,
        typer.Option(
            help="Requests under way at a time, comma-separated. "
            f"[CPU: {CPU_CONCURRENCY}; GPU: {GPU_CONCURRENCY}]"
        ),
    ] = None,
    page: Annotated[
        int | None, typer.Option(help="Tokens a page (default: those of --masks, else 128).")
    ] = None,
    window: Window = WINDOW,
    density: Annotated[
        float | None,
        typer.Option(help="In place of the window: pages at random distances, to this density."),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Mask file for such a model, in place of both.")
    ] = None,
    rounds: Rounds = ROUNDS,
    head_size: Annotated[
        int | None, typer.Option(min=32, help="Channels a head, in place of the shape's own.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers, in place of the shape's own: for TTFT a few tell of all of them."
        ),
    ] = None,
    dynamic: Annotated[
        int,
        typer.Option(
            min=0,
            help="KV heads of each layer that choose pages: as many tokens as the window beside "
            "it, or to --density.",
        ),
    ] = 0,
    crossover: Crossover = False,
    enforce_eager: Eager = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """`vllm serve`, stock and dam, asked in turn by `vllm bench serve`: TTFT, TPOT, requests/s."""
    options = E2eOptions(
        model, lengths, concurrency, page, window, density, masks, head_size, layers,
        dynamic, rounds, crossover, enforce_eager,
    )  # fmt: skip
    benchmarks.finish([e2e_benchmark(options)], json)


@app.command()
def memory(
    masks: Annotated[
        Path | None, typer.Option(help="Masks for the demo model, which is left out without.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Image of the pages held by tokens.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Requests that fit into the KV cache, pages held, and throughput, dense against dam."""
    benchmarks.finish([benchmarks.memory(masks, plot)], json)


@app.command()
def mass(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    text: Annotated[Path, typer.Option(help="Plain text that the masks have not seen.")],
    masks: Annotated[
        Path | None, typer.Option(help="Mask file. [dam/masks.safetensors in the model's folder]")
    ] = None,
    densities: Annotated[
        str | None,
        typer.Option(help="Choices of the file's frontier, as target_density. [as fitted]"),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window and of a question.")] = 8192,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 3,
    questions: Annotated[int, typer.Option(min=0, help="Questions of each retrieval task.")] = 1,
    estimates: Annotated[
        str, typer.Option(help="What is tried, comma-separated.")
    ] = "none,fitted,tail,delta,both",
    period: Annotated[
        int, typer.Option(min=1, help="Delta: every so many queries read everything.")
    ] = 64,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """What estimates of the pages not read would gain: KL and equal best tokens, in transformers.

    tail: the mean key and value of a span stand for it, in all heads; fitted: in those that have
    tails in the file; delta: dense queries correct later ones.
    """
    made = benchmarks.mass(
        model, masks, text, densities, length, windows, questions, estimates, period
    )
    benchmarks.finish([made], json)


@app.command(name="all")
def every(json: Json = None, quiet: Quiet = False) -> None:
    """All but tune and mass with their defaults, and the crossover; about half an hour."""
    chosen = [
        kernel_benchmarks.kernel(KernelOptions()),
        benchmarks.scoring(HEAD_SIZES, SCORING_LENGTHS, PAGES, CHANNELS, 4, 5),
        benchmarks.plan(PAGE, WINDOW, ROUNDS, False),
        e2e_benchmark(E2eOptions(crossover=True)),
        benchmarks.memory(None, None),
    ]
    benchmarks.finish(chosen, json)
