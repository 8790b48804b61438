from dataclasses import replace

import pytest
import torch

from dam_vllm.attention.cuda.tuning import Tuning
from dam_vllm.bench import tune
from dam_vllm.bench.gpu_timing import CudaTimer
from dam_vllm.bench.tune import entries, line, neighbours, table_lines, walk
from tests.unit.bench.host_timer import HostTimer

pytestmark = pytest.mark.slow

START = Tuning(128, 64, 8, 3)
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")


def test_neighbours_stay_in_bounds():
    assert set(neighbours(Tuning(16, 256, 8, 1))) == {
        Tuning(32, 256, 8, 1), Tuning(16, 128, 8, 1), Tuning(16, 256, 4, 1),
        Tuning(16, 256, 8, 2), Tuning(16, 256, 8, 3),
    }  # fmt: skip
    assert {each.block_m for each in neighbours(START, ("block_n", "warps", "stages"))} == {128}


def test_the_walk_reaches_the_fastest_and_passes_over_what_cannot_run():
    goal = Tuning(64, 128, 4, 5)

    def cost(tuned):
        if tuned.warps == 2:
            return None
        return 1 + sum(
            getattr(tuned, name) != getattr(goal, name)
            for name in ("block_m", "block_n", "warps", "stages")
        )

    best, tried = walk(START, cost, tune.BLOCKS)
    assert best == goal
    assert tried[START] == 5
    assert None in tried.values()


def test_noise_moves_nobody():
    best, tried = walk(START, lambda tuned: 1.0 if tuned == START else 0.995, tune.BLOCKS)
    assert best == START
    assert set(tried) == {START, *neighbours(START)}


def test_a_start_that_cannot_run_is_left():
    assert walk(START, lambda tuned: None if tuned == START else 1.0, tune.BLOCKS)[0] != START
    assert walk(START, lambda tuned: None, tune.BLOCKS)[0] == START


def test_entries_of_the_table():
    found = entries([64, 128, 256], 128, 1024, 4)
    assert [(each.few, each.wide, len(each.cases)) for each in found] == [
        (False, False, 2), (False, True, 1), (True, False, 2), (True, True, 1)
    ]  # fmt: skip
    assert {case.phase for case in found[0].cases} == {"prefill"}
    assert {(case.phase, case.batch) for case in found[3].cases} == {("decode", 4)}
    assert line(found[3], START, CPU) == "(False, True, True): Tuning(128, 64, 8, 3),"


def small():
    entry = entries([16], 16, 128, 1)[1]
    return replace(entry, cases=tuple(replace(case, kv_heads=1, heads=2) for case in entry.cases))


@interpreted
def test_candidates_run_and_one_is_best():
    rows = list(tune.measure([small()], 1, CPU, HostTimer(told=1.0), lambda: None))
    assert len(rows) > 3
    assert all(row["relative"] == 1 for row in rows)
    assert rows[0]["best"] == table_lines(rows) == "(False, True, False): Tuning(32, 32, 4, 1),"
    assert all(row["rows"] == "up to 32" and row["head_sizes"] == "16" for row in rows)


@interpreted
@pytest.mark.parametrize("wrong", [float("nan"), 0.0])
def test_a_candidate_that_computes_something_else_is_passed_over(monkeypatch, wrong):
    real = tune.attend_paged

    def attend(query, key, value, output, *others, tuned):
        real(query, key, value, output, *others, tuned=tuned)
        if tuned.stages > 1:
            output[:] = wrong

    monkeypatch.setattr(tune, "attend_paged", attend)
    rows = list(tune.measure([small()], 1, CPU, HostTimer(told=1.0), lambda: None))
    assert {row["stages"] for row in rows if row["relative"] is None} == {2, 3}
    assert all(row["relative"] == 1 for row in rows if row["stages"] == 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_gpu_is_tuned():
    wanted = entries([64], 128, 2048, 2)
    rows = list(tune.measure(wanted, 3, torch.device("cuda"), CudaTimer(), lambda: None))
    assert table_lines(rows).count("Tuning") == 2
    assert rows[0]["relative"] == 1
