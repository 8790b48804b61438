"""`dam-vllm bench kernel` and `tune`: which kernels are measured depends on the machine."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from dam_vllm.cli.benchmarks import Benchmark
from dam_vllm.options import OptionError

if TYPE_CHECKING:
    from dam_vllm.bench.gpu_case import Case

LONGEST_CPU, LONGEST_GPU, GPU_WIDTH = 65536, 2**20, 260


class Phase(StrEnum):
    """What is timed on a GPU."""

    PREFILL = "prefill"
    CHUNK = "chunk"
    DECODE = "decode"
    ALL = "all"


@dataclass(frozen=True)
class Defaults:
    """What `bench kernel` measures unless told."""

    lengths: str
    pages: str
    densities: str
    kv_heads: str
    head_size: int
    flex_up_to: int
    rounds: int


CPU = Defaults("4096,8192,16384", "32,128", "0.05,0.1,0.2", "8", 64, 8192, 5)
GPU = Defaults("8192,32768,131072", "128", "0.05,0.1,0.2,0.5,1.0", "8,4", 128, 2**20, 50)
BATCHES, CHUNKS, SPREADS = "1,8,32", "4096,8192", "even,mixed,dynamic,reuse,tail"


@dataclass(frozen=True)
class KernelOptions:
    """Options of `bench kernel`; None stands for the machine's default."""

    lengths: str | None = None
    pages: str | None = None
    densities: str | None = None
    heads: int = 32
    kv_heads: str | None = None
    head_size: int | None = None
    flex_up_to: int | None = None
    rounds: int | None = None
    phase: Phase | None = None
    batches: str | None = None
    chunks: str | None = None
    spreads: str | None = None
    fa3: Path | None = None


def kernel(options: KernelOptions) -> Benchmark:
    """One layer's attention."""
    import torch

    return _on_gpu(options) if torch.cuda.is_available() else _on_cpu(options)


def _on_cpu(options: KernelOptions) -> Benchmark:
    from dam_vllm.bench import kernel
    from dam_vllm.bench.checks import (
        counts_option,
        densities_option,
        heads_option,
        lengths_option,
        pages_option,
    )

    for name in ("phase", "batches", "chunks", "spreads", "fa3"):
        if getattr(options, name) is not None:
            raise OptionError(f"--{name} is for GPUs: torch finds no CUDA here")
    tokens = lengths_option(options.lengths or CPU.lengths, 128, LONGEST_CPU)
    pages = pages_option(options.pages or CPU.pages)
    densities = densities_option(options.densities or CPU.densities)
    (kv_heads, *others) = counts_option(options.kv_heads or CPU.kv_heads, "--kv-heads")
    if others:
        raise OptionError(f"--kv-heads is {options.kv_heads!r}: must be one number without a GPU")
    heads = (options.heads, kv_heads, options.head_size or CPU.head_size)
    heads_option(*heads)
    flex_up_to = CPU.flex_up_to if options.flex_up_to is None else options.flex_up_to
    rounds = options.rounds or CPU.rounds
    return Benchmark(
        f"attention of a prefill, one layer, bf16, {heads[0]} heads, {heads[1]} KV heads, "
        f"head size {heads[2]}",
        kernel.TARGETS,
        len(tokens) * len(pages) * len(densities),
        lambda advance: kernel.measure(
            heads, tokens, pages, densities, flex_up_to, rounds, advance
        ),
    )


def _steps(phase: Phase, batches: list[int], chunks: list[int]) -> list[tuple[str, int, int]]:
    """What is measured, for how many requests, and new tokens of a chunk."""
    steps = [("prefill", 1, 0), *(("chunk", 1, chunk) for chunk in chunks)]
    steps += [("decode", batch, 0) for batch in batches]
    return [step for step in steps if phase in (Phase.ALL, step[0])]


def _gpu_cases(options: KernelOptions) -> "list[Case]":
    """Geometries that the options ask for."""
    from dam_vllm.bench.checks import (
        counts_option,
        gpu_pages_option,
        heads_option,
        lengths_option,
    )
    from dam_vllm.bench.gpu_case import Case
    from dam_vllm.masks.page_tables import query_block_size

    pages = gpu_pages_option(options.pages or GPU.pages)
    least = max(query_block_size(page) for page in pages)
    tokens = lengths_option(options.lengths or GPU.lengths, least, LONGEST_GPU)
    batches = counts_option(options.batches or BATCHES, "--batches")
    chunks = lengths_option(options.chunks or CHUNKS, least, LONGEST_GPU, "--chunks")
    kv_heads = counts_option(options.kv_heads or GPU.kv_heads, "--kv-heads")
    size = options.head_size or GPU.head_size
    for number in kv_heads:
        heads_option(options.heads, number, size)
    return [
        Case(name, options.heads, number, size, page, length, batch, chunk)
        for page in pages
        for number in kv_heads
        for name, batch, chunk in _steps(options.phase or Phase.ALL, batches, chunks)
        for length in tokens
        if chunk < length
    ]


def _on_gpu(options: KernelOptions) -> Benchmark:
    import torch

    from dam_vllm.bench import gpu_kernel
    from dam_vllm.bench.checks import densities_option, fa3_option, spreads_option
    from dam_vllm.bench.fa3 import load
    from dam_vllm.bench.gpu_timing import CudaTimer
    from dam_vllm.bench.roof import cuda_roof

    cases = _gpu_cases(options)
    densities = densities_option(options.densities or GPU.densities)
    spreads = spreads_option(options.spreads or SPREADS)
    fa3_option(options.fa3)
    flex_up_to = GPU.flex_up_to if options.flex_up_to is None else options.flex_up_to
    try:
        flash = load(options.fa3)
        peer = flash.origin
    except ImportError as error:
        flash, peer = None, f"missing, SDPA is the baseline: {error}"
    size = options.head_size or GPU.head_size
    return Benchmark(
        f"attention of one layer, bf16, {options.heads} heads, head size {size}",
        f"{gpu_kernel.TARGETS}\nfa3: {peer}",
        len(cases) * len(densities) * len(spreads),
        lambda advance: gpu_kernel.measure(
            cases,
            densities,
            spreads,
            flash,
            flex_up_to,
            options.rounds or GPU.rounds,
            cuda_roof(),
            torch.device("cuda"),
            CudaTimer(),
            advance,
        ),
        gpu_kernel.failures,
        gpu=True,
        width=GPU_WIDTH,
    )


def tune(head_sizes: str, page: int, tokens: int, batch: int, rounds: int) -> Benchmark:
    """Block sizes of the Triton kernel."""
    import torch

    from dam_vllm.bench import tune
    from dam_vllm.bench.checks import channels_option, gpu_pages_option, lengths_option
    from dam_vllm.bench.gpu_timing import CudaTimer
    from dam_vllm.masks.page_tables import query_block_size

    sizes = channels_option(head_sizes, "--head-sizes", 16)
    gpu_pages_option(str(page), "--page")
    lengths_option(str(tokens), query_block_size(page), LONGEST_GPU, "--tokens")
    if not torch.cuda.is_available():
        raise OptionError("bench tune measures the GPU's kernel: torch finds no CUDA here")
    wanted = tune.entries(sizes, page, tokens, batch)
    return Benchmark(
        f"block sizes, prefill of {tokens} and decoding of {batch} x {tokens} tokens, page {page}, "
        f"density {tune.DENSITY}",
        "relative: time over that of the entry's first line, mean of the head sizes",
        len(wanted),
        lambda advance: tune.measure(wanted, rounds, torch.device("cuda"), CudaTimer(), advance),
        tune.table_lines,
        gpu=True,
    )
