"""Compiles for NVIDIA GPUs what a function launches, on any machine; nothing runs.

Triton decides when it is imported whether it interprets: only for processes without
TRITON_INTERPRET. `python -m tests.unit.attention.cuda.compiling` tells what dynamic heads need.
"""

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dam_vllm.attention.cuda.choosing import choose_on_device
from dam_vllm.attention.cuda.dynamic import DeviceDynamic
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.masks.budget import TopK, TopP
from dam_vllm.masks.page_tables import PageSelector, PageTables


class _Driver:
    """A GPU as far as compiling needs one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Kernels are kept by device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(
    launch: Callable[[], object], capability: int
) -> dict[str, "triton.compiler.CompiledKernel"]:
    """Compiles the kernels that a function launches, with the arguments that it hands over.

    Args:
        launch: launches kernels on tensors of the CPU.
        capability: 80, 90, ...

    Returns:
        By name; of a kernel launched in several variants the last.
    """
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[self.fn.__name__] = kernel
        return kernel

    with (
        patch.object(triton.runtime.driver, "_active", _Driver(capability)),
        patch.object(JITFunction, "run", compile_only),
    ):
        launch()
    return kernels


def resources(kernel: "triton.compiler.CompiledKernel") -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) a thread, bytes of shared memory, warps."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def choose_pages_of(
    dtype: torch.dtype,
    stored: torch.dtype,
    page: int,
    queries: int,
    channels: int = 64,
    heads_per_kv: int = 4,
) -> None:
    """Launches the choice of dynamic heads on empty tensors."""
    heads, kv_heads, size, requests, pages = 2, 8, 128, 4, 600
    flags = np.zeros((heads, 4, 4), dtype=bool)
    tables = PageTables(page, page, flags, flags[:, 0], flags[:, 0], flags[:, 0, 0])
    dynamic = DynamicHeads(
        channels=[channels, channels],
        budgets=[TopP(0.9, 1, 100), TopK(9.0, 1, 9)],
        static=PageSelector([tables]),
        scale=0.1,
        ids=[1, 3],
    )
    query = torch.empty(requests * queries, kv_heads, heads_per_kv, size, dtype=dtype)
    keys = torch.empty(pages * kv_heads, page, size, dtype=stored)
    ints = torch.zeros(requests + 1, dtype=torch.int32)
    query_blocks = DeviceQueryBlocks(ints[:4], ints[:4], ints, ints[:4], page, queries)
    table = torch.zeros(requests, pages, dtype=torch.int32)
    chosen = torch.zeros(heads, len(query_blocks), pages, dtype=torch.uint8)
    choose_on_device(
        DeviceDynamic.of(dynamic), chosen, ints[:heads], query, keys, table, query_blocks, pages
    )


def main() -> None:
    """Prints what each kernel needs."""
    stored = (torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
    for capability, keys, page, decode in itertools.product(
        (80, 90), stored, (16, 32, 128, 256), (True, False)
    ):
        if capability < 89 and keys == torch.float8_e4m3fn:
            continue  # Triton has no such type there.
        launch = partial(choose_pages_of, torch.bfloat16, keys, page, 1 if decode else page)
        for name, kernel in compile_launches(launch, capability).items():
            step = "decode" if decode else "prefill"
            print(capability, keys, f"page {page}", step, name, resources(kernel), flush=True)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    main()
