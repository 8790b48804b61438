import io

from rich.console import Console

from dam_vllm.bench.e2e import crossover_length
from dam_vllm.bench.report import table
from dam_vllm.bench.timing import alternate, ratio
from dam_vllm.machine import describe, machine

ROWS = [
    {"bench": "kernel", "tokens": 4096, "speedup": 5.123456, "flex_ms": 1.5},
    {"bench": "kernel", "tokens": 8192, "speedup": 10.0, "flex_ms": None},
]


def test_table_shows_every_value():
    output = io.StringIO()
    Console(file=output, width=100).print(table(ROWS, "title", "caption"))
    text = output.getvalue()
    for part in ("tokens", "speedup", "flex ms", "4096", "5.123", "10", "-", "title", "caption"):
        assert part in text
    assert "kernel" not in text


def test_peers_take_turns():
    calls, advanced = [], []
    peers = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = alternate(peers, 3, lambda: advanced.append(1))
    assert calls == list("abababab")
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert len(advanced) == 3


def test_ratio_is_taken_within_rounds():
    assert ratio([2.0, 20.0, 200.0], [1.0, 5.0, 100.0]) == 2.0


def test_crossover_is_where_sparse_wins_for_good():
    ratios = {512: 1.1, 1024: 0.9, 2048: 1.2, 4096: 2.0}
    rows = [{"tokens": t, "dense_below": 0, "ttft_ratio": r} for t, r in ratios.items()]
    rows.append({"tokens": 1024, "dense_below": 2048, "ttft_ratio": 1.0})
    assert crossover_length(rows) == 2048
    assert crossover_length(rows[:2]) is None


def test_machine_is_named():
    found = machine()
    assert set(found) == {"cpu", "cores", "threads", "load", "torch", "vllm"}
    assert str(found["cpu"]) in describe(found)
