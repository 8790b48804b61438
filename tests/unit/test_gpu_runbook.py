"""deploy/gpu/try.sh: skips what cannot run and says so, goes on after failures, resumes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dam_vllm.bench.model import MODELS
from dam_vllm.cli import bench
from dam_vllm.questions.tasks import Question

TRY = Path(__file__).parents[2] / "deploy/gpu/try.sh"
# Stands in for Python: has everything, and `bench tune` fails.
FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"bench tune"*) echo no memory; exit 3;; esac
"""


def part(name):
    """A script beside `try.sh`."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", TRY.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def start(*arguments, python=fake):
        environment = os.environ | {"PYTHON": str(python), "CALLS": str(tmp_path / "calls")}
        done = subprocess.run(
            [str(TRY), *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return start


def test_without_cuda_every_part_says_what_it_would_run(run, tmp_path):
    status, told, _ = run(tmp_path / "out", python="false")
    assert status == 0
    lines = [line for line in told.splitlines() if ": skipped, no CUDA device: " in line]
    assert len(lines) == 17
    assert any(line.startswith("smoke:") and "bench kernel" in line for line in lines)
    assert not list((tmp_path / "out").glob("*.log"))


def test_a_failure_is_told_and_what_is_done_is_not_repeated(run, tmp_path):
    status, told, _ = run(tmp_path / "out")
    assert status == 1
    assert "tune: FAILED (3)" in told
    assert "no memory" in told
    assert "e2e-32768: done in" in told
    assert "e2e-131072: done in" in told
    assert "sanitizer: skipped, no compute-sanitizer" in told
    calls = (tmp_path / "calls").read_text().count("-m pytest")
    status, told, _ = run(tmp_path / "out")
    assert status == 1
    assert "kernels: done before" in told
    assert (tmp_path / "calls").read_text().count("-m pytest") == calls
    assert (tmp_path / "calls").read_text().count("bench tune") == 2


def test_options_of_bench_e2e_are_taken(run, tmp_path, monkeypatch):
    run(tmp_path / "out")
    calls = (tmp_path / "calls").read_text().splitlines()
    whole = [line.split("bench e2e ")[1].split() for line in calls if "bench e2e" in line]
    assert [line[line.index("--lengths") + 1] for line in whole] == ["32768", "131072"]
    asked = []
    monkeypatch.setattr(bench, "e2e_benchmark", lambda options: asked.append(options))
    monkeypatch.setattr(bench.benchmarks, "finish", lambda *given: None)
    for line in whole:
        result = CliRunner().invoke(bench.app, ["e2e", *line])
        assert result.exit_code == 0, result.output
    assert {options.model for options in asked} <= set(MODELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: deploy/gpu/try.sh OUT"),
        (("out", "--fa3", "/gone"), "--fa3 is '/gone', must be a folder"),
        (("out", "--other"), "unknown argument '--other'"),
    ],
)
def test_bad_arguments_are_refused(run, tmp_path, arguments, message):
    status, _, error = run(*(tmp_path / each if each == "out" else each for each in arguments))
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({}, 0, ""),
        ({"failed": ["flash: RuntimeError: why"]}, 1, "even: flash: RuntimeError: why"),
        ({"triton_error": 0.02}, 1, "triton_error is 0.02, must be at most 0.01"),
        ({"flash_error": float("nan")}, 1, "flash_error is nan"),
        (None, 1, "nothing was measured"),
    ],
)
def test_smoke_fails_where_a_peer_does(tmp_path, capfd, changed, status, said):
    row = {
        "phase": "decode", "batch": 1, "tokens": 8192, "heads": "even", "triton_error": 0.0024,
        "flash_error": 0.0022, "flex_error": None,
    }  # fmt: skip
    rows = [] if changed is None else [row, row | changed]
    writes = "import pathlib, sys; pathlib.Path(sys.argv[3]).write_text(sys.argv[1])"
    command = (sys.executable, "-c", writes, json.dumps({"rows": rows}))
    assert part("smoke").main(str(tmp_path / "rows.json"), *command) == status
    assert said in capfd.readouterr().out


def test_answers_are_held_against_stocks():
    serve = part("serve")
    one = [serve.Answer(list("abcd"), ""), serve.Answer(list("ef"), "")]
    assert serve.agreement(one, one) == 1
    other = [serve.Answer(list("abxd"), ""), serve.Answer(list("efg"), "")]
    assert serve.agreement(one, other) == (2 + 2) / (4 + 3)
    late = [serve.Answer(list("abcx"), ""), serve.Answer(list("xf"), "")]
    assert serve.agreement(one, late) == 3 / 6


@pytest.mark.parametrize(
    ("whole", "fitted", "status"),
    [("17", "17", 0), ("28", "17", 1), ("17", "18", 1), ("17", "", 1)],
)
def test_serve_asks_for_equal_and_right_answers(monkeypatch, whole, fitted, status):
    serve = part("serve")
    question = Question("lines", "?", ("17",), 1, 0.5, r"\d+")
    monkeypatch.setattr(serve, "ask", lambda: ([question] * serve.QUESTIONS, []))
    asked = []

    def answers(prompts, *arguments):
        asked.append(arguments)
        text = "17" if not arguments else whole if '"masks"' in arguments[-1] else fitted
        return [serve.Answer([*text], text)] * (serve.QUESTIONS + 1)

    monkeypatch.setattr(serve, "answers", answers)
    assert serve.main("triton") == status
    assert asked[0] == ()
    assert ['"kernel": "triton"' in each[-1] for each in asked[1:]] == [True, True]
