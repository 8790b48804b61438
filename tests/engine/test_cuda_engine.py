"""The CUDA backend driven by vLLM's own scheduler and worker, against the CPU backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interpreted_triton import V2

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="runs vLLM's CPU worker, which is not installed beside CUDA",
    ),
]

ROOT = Path(__file__).parents[2]


def run(backend, *kv_free, variables=None):
    """What engines with these choices of `kv_free` found, one after the other in one process."""
    command = [sys.executable, "-m", "tests.engine.cuda_engine_run", backend, *kv_free]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | (variables or {}))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu():
    return run("cpu", "layer", "off")


@pytest.fixture(scope="module", params=[{}, V2], ids=["v1", "v2"])
def on_cuda(request):
    """Under either model runner; V2, vLLM's default where there is a GPU, makes other metadata."""
    return run("cuda", "layer", "head", variables=request.param)


def assert_close(found, wanted):
    found, wanted = torch.tensor(found["found"]), torch.tensor(wanted["found"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_both_backends_answer_alike(on_cpu, on_cuda):
    """Chunked prompts, a mixed batch, a prefix found in the cache; dynamic heads, float32."""
    assert_close(on_cuda[0], on_cpu[0])


def test_pages_of_single_heads_are_freed(on_cpu, on_cuda):
    """Chunked, mixed, with a prefix from the cache; what was freed is filled with NaN."""
    wanted, found = on_cpu[1], on_cuda[1]
    assert found["layers"] == 4 * wanted["layers"] == 16  # a unit for each KV head
    assert found["poisoned"] > 0
    assert_close(found, wanted)
