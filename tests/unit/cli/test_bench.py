import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dam_vllm.bench.e2e import STREAM
from dam_vllm.cli import bench, benchmarks, e2e_benchmark, kernel_benchmarks
from dam_vllm.cli.benchmarks import Benchmark, finish
from dam_vllm.cli.e2e_benchmark import E2eOptions, e2e
from dam_vllm.cli.kernel_benchmarks import KernelOptions, Phase
from dam_vllm.cli.program import plain_console
from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.options import OptionError


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_cut_run_keeps_its_rows(tmp_path):
    file = tmp_path / "rows.json"

    def run(advance):
        yield {"bench": "x", "ms": 1.0}
        assert len(json.loads(file.read_text())["rows"]) == 1
        yield {"bench": "x", "ms": 2.0, "failed": ["peer: why"]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish([Benchmark("title", "notes", 2, run)], file)
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [1.0, 2.0]


def test_a_folder_for_the_rows_is_refused_before_anything_is_measured(tmp_path):
    measured = []
    benchmark = Benchmark("title", "notes", 1, lambda advance: measured.append(1) or [])
    with pytest.raises(OptionError, match=r"--json is '.*', a folder; must be a file"):
        finish([benchmark], tmp_path)
    assert measured == []


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


def test_names_in_brackets_are_shown_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks, "PROGRESS", plain_console(stderr=True, force_terminal=True))
    name = "[v2]x[/b]{a}:key:"
    said = Benchmark(name, name, 1, lambda advance: [{"bench": "x", "masks": name}])
    finish([said], None)
    shown = capsys.readouterr()
    assert shown.out.count(name) == 3
    assert name in shown.err


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
        (KernelOptions(chunks="100"), "--chunks is '100'.*multiples of 128"),
        (KernelOptions(kv_heads="8,5"), "--heads is 32.*multiple of --kv-heads, 5"),
    ],
)
def test_gpu_options_are_checked(monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(OptionError, match=said):
        kernel_benchmarks.kernel(options)


@pytest.mark.parametrize(
    ("phase", "count"),
    [
        (None, 2 * (3 + 5 + 9)),
        (Phase.PREFILL, 2 * 3),
        (Phase.CHUNK, 2 * (3 + 2)),  # a chunk of 8192 is no chunk of 8192
        (Phase.DECODE, 2 * 9),
    ],
)
def test_gpu_cases(monkeypatch, phase, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dam_vllm.bench.fa3.load", lambda folder: missing())
    found = kernel_benchmarks.kernel(KernelOptions(phase=phase))
    assert found.total == count * 5 * 5
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


@pytest.mark.parametrize(
    ("page", "tokens", "said"),
    [(48, 1024, "--page is '48'.*of 16, 32"), (128, 100, "--tokens is '100'.*multiples of 128")],
)
def test_tuning_names_its_options(page, tokens, said):
    with pytest.raises(OptionError, match=said):
        kernel_benchmarks.tune("64", page, tokens, 1, 1)


@pytest.fixture
def memory(monkeypatch):
    """Function that sets the free memory, in GB."""

    def put(gigabytes):
        monkeypatch.setattr("dam_vllm.bench.servers.free_memory", lambda: int(gigabytes * 1e9))

    put(24)
    return put


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (E2eOptions(model="llama"), "--model is 'llama': must be one of long, llama-3.2-1b, "),
        (E2eOptions(lengths="100"), "--lengths is '100'.*multiples of 128"),
        (E2eOptions(concurrency="1,0"), "--concurrency is '1,0'"),
        (E2eOptions(window=0), "--window is 0"),
        (E2eOptions(density=1.5), "--density is '1.5'.*above 0 up to 1"),
        (E2eOptions(density=0.1, window=64), "--density is in place of --window"),
        (E2eOptions(masks=Path("/gone")), "--masks is '/gone'.*existing file"),
        (E2eOptions(masks=Path(__file__), density=0.1), "--masks says .* leave out --density"),
        (E2eOptions(masks=Path(__file__), dynamic=1), "--masks says .* leave out --density"),
        (E2eOptions(head_size=60), "--head-size is 60"),
        (E2eOptions(model="qwen3-8b", dynamic=9), "--dynamic is 9.*from 0 to 8 KV heads"),
        (E2eOptions(model="llama-3.1-8b", lengths="131072"), "1 x 131200 tokens.*24.0 GB are free"),
    ],
)
def test_e2e_options_are_checked(memory, options, said):
    with pytest.raises(OptionError, match=said):
        e2e(options)


def test_e2e_counts_its_steps_and_says_what_it_serves(memory):
    found = e2e(E2eOptions(lengths="1024,2048", concurrency="1,3"))
    assert found.total == 1 + 4
    assert "long: 4 layers, hidden 512, 32 heads, 8 KV heads of 64" in found.title
    assert "window of 513" in found.title
    memory(6)
    options = E2eOptions("llama-3.2-1b", "1024", density=0.25, dynamic=2, crossover=True)
    found = e2e(options)
    assert found.total == 3 * (1 + 1)
    for part in (
        "llama-3.2-1b: 16 layers",
        "density 0.25",
        "2 KV heads choose",
        "one server after",
    ):
        assert part in found.title


def test_e2e_shapes_can_be_changed_and_say_so(monkeypatch, memory):
    given = []
    monkeypatch.setattr("dam_vllm.bench.e2e.measure", lambda *all: given.extend(all))
    found = e2e(E2eOptions("llama-3.1-8b", "1024", layers=3, head_size=64, eager=True))
    found.run(None)
    name, setup, loads, rounds = given[:4]
    assert name == "llama-3.1-8b, layers 3, head size 64"
    assert (setup.model.layers, setup.model.head_size, setup.model.hidden) == (3, 64, 4096)
    assert (setup.length, setup.arguments, rounds) == (1152, ("--enforce-eager", STREAM), 3)
    assert [(load.tokens, load.concurrency) for load in loads] == [(1024, 1)]


def test_e2e_serves_the_pages_of_the_masks_fit(memory, tmp_path):
    file = tmp_path / "masks.safetensors"
    masks = streaming(str(model_dir()), 1, 64)

    def title(fit, **options):
        masks.header.parameters.update(fit)
        save_mask_set(masks, file)
        return e2e(E2eOptions(masks=file, lengths="1024", **options)).title

    assert ", page 128, masks" in title({})
    assert ", page 32, masks" in title({"fit": {"page": 32}})
    assert ", page 64, masks" in title({}, page=64)
    with pytest.raises(OptionError, match=r"that --masks '.*' was fitted for is '48': must be mul"):
        title({"fit": {"page": 48}})
    with pytest.raises(OptionError, match="--page is '48': must be multiples of 32"):
        title({}, page=48)


def test_e2e_asks_for_more_at_a_time_on_a_gpu(monkeypatch, memory):
    assert e2e(E2eOptions(lengths="1024")).total == 1 + 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert e2e(E2eOptions(lengths="1024")).total == 1 + 3


def test_the_crossover_is_told():
    rows = [{"tokens": 1024, "dense_below": 0, "ttft_ratio": ratio} for ratio in (0.9, 1.1)]
    assert e2e_benchmark.crossover(rows[:1]) == "crossover: not reached"
    assert e2e_benchmark.crossover(rows[1:]) == "crossover: 1024 tokens"
    assert e2e_benchmark.crossover([{"dense_below": 2048}]) == ""
