"""The CUDA backend driven by vLLM's own scheduler and worker, against the CPU backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interpreted_triton import V2

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def run(backend, kv_free="layer", variables=None):
    command = [sys.executable, "-m", "tests.engine.cuda_engine_run", backend, kv_free]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | (variables or {}))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wanted():
    if torch.cuda.is_available():
        pytest.skip("runs vLLM's CPU worker, which is not installed beside CUDA")
    return torch.tensor(run("cpu")["found"])


@pytest.mark.parametrize("variables", [{}, V2], ids=["v1", "v2"])
def test_both_backends_answer_alike(wanted, variables):
    """Chunked prompts, a mixed batch, a prefix found in the cache; dynamic heads, float32.

    Model Runner V2, vLLM's default where there is a GPU, hands over metadata of its own making.
    """
    found = torch.tensor(run("cuda", variables=variables)["found"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU worker")
@pytest.mark.parametrize("variables", [{}, V2], ids=["v1", "v2"])
def test_pages_of_single_heads_are_freed(variables):
    """Chunked, mixed, with a prefix from the cache; what was freed is filled with NaN."""
    wanted, found = run("cpu", "off"), run("cuda", "head", variables)
    assert found["layers"] == 4 * wanted["layers"] == 16  # a unit for each KV head
    assert found["poisoned"] > 0
    torch.testing.assert_close(
        torch.tensor(found["found"]), torch.tensor(wanted["found"]), rtol=0, atol=1e-4
    )
