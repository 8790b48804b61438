"""`dam-vllm bench e2e` as it is called: servers of both backends, asked by vLLM's own client."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e


def test_both_backends_are_measured(tmp_path):
    file = tmp_path / "rows.json"
    command = [
        sys.executable, "-m", "dam_vllm", "bench", "e2e", "--lengths", "2304", "--concurrency", "2",
        "--rounds", "1", "--density", "0.3", "--dynamic", "2", "--enforce-eager",
        "--json", str(file),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["model"], row["tokens"], row["concurrency"]) == ("long", 2304, 2)
    # All but the last two query blocks lie below `dense_below`.
    assert 0.8 < row["density"] < 1
    for name in ("ttft_ms", "ttft_p99_ms", "tpot_ms", "req/s"):
        assert row[f"dense_{name}"] > 0
        assert row[f"dam_{name}"] > 0
    assert "ttft ratio" in " ".join(done.stdout.split())
