"""The GPU benchmark from end to end: with the oracle for FlashAttention and the host's clock."""

import math

import pytest
import torch

from dam_vllm.attention.cuda.rotation import DeviceRotation
from dam_vllm.bench import gpu_kernel, peers, serving
from dam_vllm.bench.fa3 import Flash
from dam_vllm.bench.gpu_case import Case, draw, geometry
from dam_vllm.bench.gpu_timing import CudaTimer
from dam_vllm.bench.reference import expected, relative_error, sample
from dam_vllm.bench.roof import Roof
from dam_vllm.bench.scattered import Spread, scattered
from tests.unit.attention.cuda.launches import Launches
from tests.unit.attention.cuda.no_sync import no_sync
from tests.unit.attention.cuda.varlen_oracle import varlen
from tests.unit.bench.host_timer import HostTimer

pytestmark = pytest.mark.slow

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PREFILL = Case("prefill", 2, 1, 16, 64, 256, 1)
CHUNK = Case("chunk", 4, 2, 16, 32, 640, 1, 256)
DECODE = Case("decode", 4, 2, 16, 32, 256, 2)
ROOF = Roof(1e12, 1e14)
ORACLE = Flash(varlen, lambda **given: torch.tensor(given["batch_size"]), "oracle")


def run(cases, densities, flash, advanced=None, spreads=(Spread.EVEN,)):
    count = advanced if advanced is not None else []
    return list(
        gpu_kernel.measure(
            cases, densities, spreads, flash, 0, 1, ROOF, HERE, HostTimer(), lambda: count.append(1)
        )
    )


def test_every_peer_is_timed_and_right():
    advanced = []
    rows = run([PREFILL, DECODE, CHUNK], [0.5, 1.0], ORACLE, advanced)
    assert len(advanced) == 6
    assert [(row["phase"], row["batch"], row["density"] == 1) for row in rows] == [
        ("prefill", 1, False), ("prefill", 1, True), ("decode", 2, False), ("decode", 2, True),
        ("chunk", 1, False), ("chunk", 1, True),
    ]  # fmt: skip
    for row in rows:
        assert "failed" not in row
        assert row["baseline"] == "fa3"
        assert row["flex_ms"] is None
        peers_of = {"prefill": ("contiguous", "sdpa"), "decode": ("sdpa",), "chunk": ()}
        for name in ("fa3", "triton", "flash", *peers_of[row["phase"]]):
            assert row[f"{name}_ms"] > 0
            assert 0 < row[f"{name}_error"] < 1e-2
        assert row["plan_ms"] > 0
        for name in ("triton", "flash"):
            product = row[f"{name}_speedup"] * row["density"]
            assert row[f"{name}_x_density"] == pytest.approx(product)
        assert (row["contiguous_ms"] is None) == (row["phase"] != "prefill")
    sparse, dense = rows[:2]
    # The roof counts what each reads: the sparse step's work over the dense one's is known.
    shares = (row["flash_roof"] * row["flash_ms"] for row in (sparse, dense))
    works = [scattered(PREFILL, density).work for density in (0.5, 1.0)]
    least, most = shares
    assert least / most == pytest.approx(ROOF.seconds(works[0]) / ROOF.seconds(works[1]))
    assert sparse["fa3_roof"] * sparse["fa3_ms"] == pytest.approx(most)


@pytest.mark.parametrize("flash", [None, varlen], ids=["triton", "flash"])
def test_the_first_layer_makes_the_plan(flash):
    selection, inputs = scattered(DECODE, 0.5), draw(DECODE, HERE, 3)
    calls = serving.dam_calls(DECODE, geometry(DECODE, HERE), inputs, selection, flash)
    launched = []
    for call in calls:
        with Launches() as launches:
            call()
        launched.append(launches.triton.count("_plan_kernel"))
    assert launched == [1, 0, 0]


@pytest.mark.parametrize("case", [CHUNK, DECODE], ids=["chunk", "decode"])
def test_dynamic_heads_launch_what_serving_does(case):
    """So that a CUDA graph holds it; what is stored is what the cache holds already."""
    selection, inputs = scattered(case, 0.5, Spread.DYNAMIC), draw(case, HERE, 2)
    before = [each.cache.clone() for each in inputs]
    calls = serving.dam_calls(case, geometry(case, HERE), inputs, selection, None)
    for call in calls:
        call()  # as before a graph is captured
    for call in calls:
        with no_sync(), Launches() as launches:
            call()
        assert launches.all == launches.triton
        assert [launches.all.count(name) for name in ("_store_kernel", "_rotate")] == [1, 1]
    for each, kept in zip(inputs, before, strict=True):
        torch.testing.assert_close(each.cache, kept, rtol=0, atol=0)


def test_spreads():
    """Heads that choose read as many pages; those of fitted masks differ, but not on average."""
    case = Case("decode", 4, 4, 16, 32, 768, 2)
    even, mixed, chosen, reused, tailed = run([case], [0.4], ORACLE, spreads=list(Spread))
    rows = (even, mixed, chosen, reused, tailed)
    assert [row["heads"] for row in rows] == ["even", "mixed", "dynamic", "reuse", "tail"]
    for row in (mixed, chosen, reused, tailed):
        assert "failed" not in row
        assert row["density"] == pytest.approx(even["density"], abs=0.05)
    assert mixed["flash_error"] < 1e-2
    assert chosen["flash_error"] is tailed["flash_error"] is None
    assert tailed["density"] == even["density"]
    nothing = DeviceRotation(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 16, 16))
    for spread, ids in ((Spread.EVEN, []), (Spread.TAIL, [0, 1, 2, 3])):
        (layer,) = serving._layers(case, scattered(case, 0.4, spread), None, 1, nothing)
        assert (list(layer.tails.ids) if layer.tails else []) == ids
    counts = scattered(case, 0.4, Spread.MIXED).pages.float().mean((1, 2))
    assert counts.max() > 3 * counts.min()
    for spread, dynamic in ((Spread.DYNAMIC, 5), (Spread.REUSE, 2)):
        heads = torch.zeros(1, dtype=torch.int64, device=HERE)
        rotation = DeviceRotation(heads, torch.eye(16, device=HERE)[None])
        layers = serving._layers(case, scattered(case, 0.4, spread), None, 5, rotation)
        assert sum(layer.choosing.dynamic is not None for layer in layers) == dynamic
        for layer in layers:
            assert (layer.rotation is None) == (layer.choosing.dynamic is None)
            assert layer.choosing.heads.tolist() == [0]
            assert layer.static[0].ids == (1, 2, 3)


def test_a_peer_that_fails_is_named_and_the_others_stay():
    def refuses(**given):
        raise RuntimeError("no such\nkernel")

    rows = run([DECODE], [1.0], Flash(refuses, None, "broken"))
    assert rows[0]["failed"] == [
        f"{name}: RuntimeError: no such kernel" for name in ("fa3", "flash")
    ]
    assert rows[0]["fa3_ms"] is rows[0]["flash_ms"] is rows[0]["flash_x_density"] is None
    assert rows[0]["baseline"] == "sdpa"
    assert rows[0]["triton_speedup"] > 0
    said = gpu_kernel.failures(rows)
    assert said.count("\n") == 1
    assert "fa3: RuntimeError: no such kernel (decode 2 x 256, GQA 2, density 1)" in said


def test_without_flash_attention_sdpa_is_the_baseline():
    (row,) = run([DECODE], [0.5], None)
    assert row["baseline"] == "sdpa"
    assert row["fa3_ms"] is row["flash_ms"] is None
    assert "failed" not in row


def test_wrong_and_missing_outputs_show_as_errors():
    def last_page_unseen(seqused_k, **given):
        varlen(seqused_k=seqused_k - 32, **given)

    def writes_nothing(**given):
        pass

    wrong = run([DECODE], [1.0], Flash(last_page_unseen, None, "wrong"))[0]
    assert wrong["fa3_error"] > 0.05
    assert wrong["flash_error"] > 0.05
    assert math.isnan(run([DECODE], [1.0], Flash(writes_nothing, None, "idle"))[0]["fa3_error"])


@pytest.mark.parametrize(
    "case",
    [Case("prefill", 4, 2, 16, 64, 1024, 1), Case("decode", 4, 2, 16, 64, 1024, 2)],
    ids=["prefill", "decode"],
)
def test_flex_reads_the_selected_pages(case):
    selection, (inputs,) = scattered(case, 0.6), draw(case, HERE)
    assert selection.density < 0.8
    sampled = sample(case, HERE)
    torch.compiler.reset()
    (call,) = peers.flex_calls(case, [inputs], selection)
    found = call()
    wanted = expected(case, inputs, selection.pages, sampled)
    assert relative_error(found, sampled, wanted) < 1e-2
    dense = expected(case, inputs, None, sampled)
    assert relative_error(found, sampled, dense) > 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_timer_replays_what_it_recorded():
    timer = CudaTimer()
    left = torch.randn(4096, 4096, device="cuda")
    count = torch.zeros(1, device="cuda")
    calls = [lambda: left @ left, lambda: count.add_(1)]
    for call in calls:
        call()
    once, often = timer.bind(calls), timer.bind(calls * 8)
    assert count.item() == 1
    timer.seconds(once)
    assert count.item() == 2
    timer.seconds(often)
    assert count.item() == 10
    assert timer.seconds(often) > 4 * timer.seconds(once) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_gpu_is_measured(phase):
    case = Case(phase, 8, 2, 128, 128, 4096, 1)
    timer, device = CudaTimer(), torch.device("cuda")
    rows = list(
        gpu_kernel.measure(
            [case], [0.2, 1.0], [Spread.EVEN], None, 4096, 5, ROOF, device, timer, lambda: None
        )
    )
    for row in rows:
        assert "failed" not in row
        for name in ("sdpa", "flex", "triton"):
            assert row[f"{name}_ms"] > 0
            assert row[f"{name}_error"] < 1e-2
        assert row["triton_eager_ms"] > 0
