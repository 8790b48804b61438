"""Rows of `bench e2e` from servers that a fake client asks."""

from contextlib import contextmanager

import pytest
import torch

from dam_vllm.bench import e2e
from dam_vllm.bench.client import Figures, Load
from dam_vllm.bench.model import LONG, MODELS
from dam_vllm.bench.servers import Setup
from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.density import density

SETUP = Setup(LONG, length=4224, page=128, window=129)
LOADS = [Load(1000, 17, 1), Load(3333, 17, 4, 4)]


@pytest.fixture
def asked(monkeypatch):
    """What was started and asked, in turn; each answer takes as long as the fake below says."""
    calls = []
    masks = streaming(str(model_dir()), 1, 129)

    @contextmanager
    def serve(setup, peers):
        calls.append(("start", tuple(peers)))
        yield {name: name for name in peers}, masks
        calls.append(("stop", tuple(peers)))

    def ask(server, load, seed):
        calls.append((server, load.tokens, seed))
        slow = {"dense": 4.0, "dam": 2.0, "sparse": 1.0}[server] * (1 + seed)
        return Figures(slow, slow, 10 * slow, slow / 2, 0.0, 8 / slow)

    monkeypatch.setattr(e2e, "serve", serve)
    monkeypatch.setattr(e2e, "ask", ask)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls, masks


@pytest.mark.parametrize("alone", [False, True])
def test_rows(asked, alone):
    _, masks = asked
    peers = e2e.peers_of(crossover=True)
    groups = [{name: options} for name, options in peers.items()] if alone else [peers]
    advanced = []
    rows = list(e2e.measure("long", SETUP, LOADS, 2, groups, lambda: advanced.append(1)))
    assert len(advanced) == len(groups) * (1 + len(LOADS))
    assert len(rows) == 4
    found = {(row["tokens"], row["dense_below"]): row for row in rows}
    assert set(found) == {(1000, 2048), (1000, 0), (3333, 2048), (3333, 0)}
    assert found[1000, 2048]["density"] == 1.0
    for tokens, below in ((1000, 0), (3333, 0), (3333, 2048)):
        read = density(masks, [tokens], 128, below)[1].mean()
        assert found[tokens, below]["density"] == pytest.approx(read)
    row = found[3333, 0]
    assert (row["model"], row["concurrency"], row["rounds"]) == ("long", 4, 2)
    # Medians of two rounds, the second of them twice as slow.
    assert (row["dense_ttft_ms"], row["dam_ttft_ms"], row["ttft_ratio"]) == (6.0, 1.5, 4.0)
    assert (row["dense_ttft_p99_ms"], row["dam_tpot_ms"]) == (60.0, 0.75)
    assert (row["dense_req/s"], row["dam_req/s"], row["req/s_ratio"]) == (1.5, 6.0, 4.0)
    assert [each["dam"]["ttft_mean"] for each in row["each_round"]] == [1.0, 2.0]
    # All tokens but the first come together.
    assert not any("gap" in figures for each in row["each_round"] for figures in each.values())


def test_servers_that_run_together_are_asked_in_turn_and_rows_come_at_once(asked):
    calls, _ = asked
    rows = e2e.measure("long", SETUP, LOADS, 2, [e2e.peers_of(False)], lambda: None)
    assert next(rows)["tokens"] == 1000
    assert calls == [
        ("start", ("dense", "dam")),
        ("dense", 1000, 0), ("dam", 1000, 0), ("dam", 1000, 1), ("dense", 1000, 1),
    ]  # fmt: skip
    assert next(rows)["tokens"] == 3333
    assert list(rows) == []
    assert calls[-1] == ("stop", ("dense", "dam"))


def test_cheap_loads_are_asked_more_often(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = e2e.load_of(LONG, 1024, 1)
    assert (found.requests, found.warm_ups, found.concurrency) == (4, 1, 1)
    assert e2e.load_of(LONG, 16384, 1).requests == 1
    assert e2e.load_of(LONG, 16384, 1).warm_ups == 0
    found = e2e.load_of(MODELS["llama-3.2-1b"], 1024, 16)
    assert (found.requests, found.warm_ups, found.concurrency) == (16, 0, 16)
