"""The order of servers, what is asked once, and going on after a stop."""

import json

import pytest

from dam_vllm.evaluation.results import agreement_rows, score_rows, worst
from dam_vllm.evaluation.runner import Evaluation
from dam_vllm.evaluation.settings import Subject
from dam_vllm.evaluation.state import RECORDS, State
from dam_vllm.masks.baselines import dense, streaming
from tests.unit.evaluation.conftest import MODEL, Servers

TEXT = "def add(a, b):\n    return a + b\n\n" * 400


@pytest.fixture
def subjects():
    return [
        Subject("full", "full-key", dense(MODEL)),
        Subject("half", "half-key", streaming(MODEL, 4, 40)),
    ]


@pytest.fixture
def run(tokenizer, tmp_path):
    """A function that runs an evaluation over one folder."""

    def once(settings, servers, subjects):
        steps = []
        state = State(tmp_path / "state")
        evaluation = Evaluation(
            settings, tokenizer, state, servers.start, lambda *step: steps.append(step)
        )
        return evaluation.run(subjects), state, steps

    return once


def test_every_subject_is_asked_everything_once(settings, tokenizer, subjects, run):
    chosen = settings()
    servers = Servers(tokenizer, chosen)
    places, _, steps = run(chosen, servers, subjects)
    assert servers.started == ["dense", "full", "half"]
    assert [(place.subject.name, place.length) for place in places] == [
        (name, length) for name in ("dense", "full", "half") for length in (512, 768)
    ]
    # Twelve questions, and one unmeasured at each length.
    assert len(servers.asked) == 3 * (12 + 2)
    assert set(servers.asked) == set(servers.answers)
    assert steps[-1] == ("half", 36, 36)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def test_rows(settings, tokenizer, subjects, run):
    chosen = settings()
    places, state, _ = run(chosen, Servers(tokenizer, chosen), subjects)
    rows = score_rows(chosen, state, places)
    assert len(rows) == 3 * 2 * 2
    found = {(row["masks"], row["task"], row["length"]): row for row in rows}
    assert {row["density"] for row in rows if row["masks"] == "half"} == {0.5}
    assert {row["density"] for row in rows if row["masks"] != "half"} == {1.0}
    assert {row["seconds"] for row in rows} == {0.5}
    assert all(row["accuracy"] == 1.0 for row in rows if row["masks"] == "dense")
    # Of the four kinds of prompt these alone are long for the pretender.
    assert found["half", "lines", 768]["accuracy"] == 0.0
    assert found["half", "words", 512]["accuracy"] == 1.0
    assert found["half", "words", 512]["depths"] is None
    depths = found["dense", "lines", 768]["depths"]
    assert [depth is None for depth in depths].count(False) == 3
    assert worst(rows, ["half"])[0]["difference"] == -1.0


@pytest.mark.parametrize("limit", [1, 7, 17, 40])
def test_goes_on_after_a_stop(settings, tokenizer, subjects, run, limit):
    chosen = settings()
    servers = Servers(tokenizer, chosen)
    places, state, _ = run(chosen, servers, subjects)
    whole = score_rows(chosen, state, places)
    (state.folder / RECORDS).unlink()
    servers = Servers(tokenizer, chosen)
    servers.limit = limit
    with pytest.raises(KeyboardInterrupt):
        run(chosen, servers, subjects)
    assert servers.alive == 0
    kept = (state.folder / RECORDS).read_text() if limit > 1 else ""
    servers.limit = None
    before = len(servers.asked)
    places, state, steps = run(chosen, servers, subjects)
    assert (state.folder / RECORDS).read_text().startswith(kept)
    assert len(servers.asked) - before <= 3 * (12 + 2) - len(kept.splitlines())
    assert score_rows(chosen, state, places) == whole
    assert steps[-1][1:] == (36, 36)


def test_finished_one_starts_no_server(settings, tokenizer, subjects, run):
    chosen = settings()
    servers = Servers(tokenizer, chosen)
    run(chosen, servers, subjects)
    servers.started.clear()
    run(chosen, servers, subjects)
    assert servers.started == []
    more = settings(lengths=(512, 768, 1024))
    servers = Servers(tokenizer, more)
    run(more, servers, subjects)
    assert len(servers.asked) == 3 * (6 + 1)


def test_torn_last_line_is_asked_again(settings, tokenizer, subjects, run):
    chosen = settings()
    _, state, _ = run(chosen, Servers(tokenizer, chosen), subjects)
    file = state.folder / RECORDS
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-1]) + whole[-1][:20])
    servers = Servers(tokenizer, chosen)
    run(chosen, servers, subjects)
    assert servers.started == ["half"]
    assert len(servers.asked) == 2
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == [
        json.loads(line)["key"] for line in whole
    ]


def test_streaming_follows_each_sparse_file_at_each_length(settings, tokenizer, subjects, run):
    chosen = settings(streaming=True)
    servers = Servers(tokenizer, chosen, {"full": (1, 1), "half": (7, 10), "streaming": (71, 100)})
    places, state, steps = run(chosen, servers, subjects)
    assert servers.started == ["dense", "full", "half", "streaming@half", "streaming@half"]
    peers = [place for place in places if place.subject.name == "streaming@half"]
    assert [place.length for place in peers] == [512, 768]
    windows = [place.subject.masks.header.parameters["window"] for place in peers]
    assert windows[0] < windows[1]
    assert steps[-1][1:] == (5 * 6 + 3 * 6, 5 * 6 + 3 * 6)
    rows = score_rows(chosen, state, places)
    assert [row["density"] for row in rows if row["masks"] == "streaming@half"] == [0.71] * 4


def test_agreement(settings, tokenizer, subjects, run):
    chosen = settings(text=TEXT, windows=2, lengths=(512,))
    places, state, _ = run(chosen, Servers(tokenizer, chosen), subjects)
    rows = {row["masks"]: row for row in agreement_rows(chosen, state, places)}
    assert list(rows) == ["dense", "full", "half"]
    assert rows["dense"]["kl"] == 0
    assert rows["dense"]["perplexity"] == pytest.approx(2.718281828**3.5)
    assert rows["half"]["perplexity"] == pytest.approx(2.718281828**5)
    assert rows["half"]["top1"] == 1.0
    assert rows["half"]["kl"] > 0.5
    assert rows["half"]["density"] == 0.5
    assert rows["half"]["windows"] == 2
