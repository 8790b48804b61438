"""Rows of `bench plan` from servers that a fake client asks."""

from contextlib import contextmanager

from dam_vllm.bench import plan_time
from dam_vllm.bench.client import Figures


def test_shares_are_of_the_steps_that_the_client_saw(monkeypatch):
    asked, planned = [], []

    @contextmanager
    def serve(setup, peers):
        yield dict.fromkeys(peers, "server"), "masks"

    def ask(server, load, seed):
        asked.append((load.tokens, load.new, load.requests, load.concurrency))
        return Figures(1.0, 3000.0, 5.0, 7.0, 20.0, 9.0)

    def plan_seconds(shape, masks, page, requests, tokens, new, rounds):
        planned.append((requests, tokens, new, rounds))
        return 0.001

    for name, fake in (("serve", serve), ("ask", ask), ("plan_seconds", plan_seconds)):
        monkeypatch.setattr(plan_time, name, fake)
    monkeypatch.setattr(plan_time, "rest", lambda: None)
    rows = plan_time.measure(128, 513, 2, (), lambda: None)
    decode, prefill = (4096, 64, 16, 8), (16384, 1, 2, 1)
    assert asked == [decode, prefill, decode]
    assert planned == [(8, 4096, 1, 20), (1, 16384, 16384, 20), (8, 4096, 1, 20)]
    assert [row["step_ms"] for row in rows] == [20.0, 3000.0, 20.0]
    assert [round(row["share"], 6) for row in rows] == [0.05, 0.000333, 0.05]
