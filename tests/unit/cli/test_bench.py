import json

import pytest
import torch
from typer.testing import CliRunner

from dam_vllm.cli import bench, benchmarks, kernel_benchmarks
from dam_vllm.cli.benchmarks import Benchmark, finish
from dam_vllm.cli.kernel_benchmarks import KernelOptions, Phase
from dam_vllm.options import OptionError


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_cut_run_keeps_its_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"

    def run(advance):
        yield {"bench": "x", "ms": 1.0}
        assert len(json.loads(file.read_text())["rows"]) == 1
        yield {"bench": "x", "ms": 2.0, "failed": ["peer: why"]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish([Benchmark("title", "notes", 2, run)], file)
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [1.0, 2.0]


def test_conclusions_follow_the_table(capsys):
    rows = [{"bench": "x", "ms": 1.5, "failed": ["peer: why"]}]
    said = Benchmark(
        "title", "some notes", 1, lambda advance: rows, lambda rows: f"[{len(rows)}] row"
    )
    finish([said], None)
    out = capsys.readouterr().out
    assert out.index("notes") < out.index("[1] row")
    assert "1.5" in out
    assert "why" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (KernelOptions(phase=Phase.DECODE), "--phase is for GPUs"),
        (KernelOptions(batches="1"), "--batches is for GPUs"),
        (KernelOptions(kv_heads="8,4"), "--kv-heads is '8,4': must be one number"),
        (KernelOptions(pages="16"), "--pages is '16'.*multiples of 32"),
        (KernelOptions(lengths="131072"), "--lengths is '131072'.*up to 65536"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        kernel_benchmarks.kernel(options)


def test_cpu_defaults_are_as_they_were():
    found = kernel_benchmarks.kernel(KernelOptions())
    assert found.total == 3 * 2 * 3
    assert "32 heads, 8 KV heads, head size 64" in found.title
    assert not found.gpu


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (KernelOptions(pages="48"), "--pages is '48'.*of 16, 32, 64, 128, 256"),
        (KernelOptions(pages="256", lengths="384"), "--lengths is '384'.*multiples of 256"),
        (KernelOptions(batches="0"), "--batches is '0'"),
        (KernelOptions(kv_heads="8,5"), "--heads is 32.*multiple of --kv-heads, 5"),
    ],
)
def test_gpu_options_are_checked(monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(OptionError, match=said):
        kernel_benchmarks.kernel(options)


@pytest.mark.parametrize(
    ("phase", "count"), [(None, 2 * (3 + 9)), (Phase.PREFILL, 2 * 3), (Phase.DECODE, 2 * 9)]
)
def test_gpu_cases(monkeypatch, tmp_path, phase, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dam_vllm.bench.fa3.load", lambda folder: missing())
    found = kernel_benchmarks.kernel(KernelOptions(phase=phase))
    assert found.total == count * 5
    assert "SDPA is the baseline: not there" in found.notes


def missing():
    raise ImportError("not there")


def test_tuning_needs_a_gpu(monkeypatch):
    ran = []
    monkeypatch.setattr(benchmarks, "finish", lambda *given: ran.append(given))
    result = CliRunner().invoke(bench.app, ["tune"])
    assert isinstance(result.exception, OptionError)
    assert "torch finds no CUDA here" in str(result.exception)
    assert ran == []
