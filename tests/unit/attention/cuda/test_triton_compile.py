"""The kernels compile for GPUs that are not here, and fit into their registers and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
# Bytes of shared memory that a program may take (CUDA C Programming Guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024}
SPILLED = 64
KERNELS = {
    "_add_tail", "_attend_kernel", "_choose_pages", "_close_step", "_merge_kernel", "_plan_kernel",
    "_rotate", "_share_pages", "_score_pages", "_store_kernel", "_sum_chunks", "_write_means",
}  # fmt: skip


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_and_fit(capability):
    command = [sys.executable, "-m", "tests.unit.attention.cuda.compile_cases", str(capability)]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["stack"] <= SPILLED, kernel
