"""The CUDA backend driven by vLLM's own scheduler and worker, against the CPU backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def run(backend):
    command = [sys.executable, "-m", "tests.engine.cuda_engine_run", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_backends_answer_alike():
    """Chunked prompts, a mixed batch, a prefix found in the cache; dynamic heads, float32."""
    if torch.cuda.is_available():
        pytest.skip("runs vLLM's CPU worker, which is not installed beside CUDA")
    torch.testing.assert_close(
        torch.tensor(run("cuda")), torch.tensor(run("cpu")), rtol=0, atol=1e-4
    )
