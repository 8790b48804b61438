"""Estimates of what is not read, against plain loops, and what a whole run tells."""

from random import Random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dam_vllm.attention.oracle import page_mask
from dam_vllm.bench import mass
from dam_vllm.bench.estimates import Estimate, Estimated
from dam_vllm.calibration.fit.states import LayerStates, prepare
from dam_vllm.cli import bench
from dam_vllm.masks.baselines import dense
from dam_vllm.masks.file import save_mask_set
from dam_vllm.options import OptionError
from tests.unit.calibration.conftest import WORDS, build, save_tokenizer

PAGE, SIZE = 16, 8
DELTAS = (Estimate.DELTA, Estimate.BOTH)


@pytest.fixture
def states(rng):
    torch.manual_seed(int(rng.integers(2**31)))
    tokens = 300
    return LayerStates(
        0, torch.randn(4, tokens, SIZE) * 3, torch.randn(2, tokens, SIZE),
        torch.randn(2, tokens, SIZE), 0.4, 0.0,
    )  # fmt: skip


def naive(states, reads, head, row, span):
    """One query's output from keys bool [keys] that it reads, and a tail of spans."""
    query, kv = states.query[head].double()[row], head // states.heads_per_kv
    key, value = states.key[kv].double(), states.value[kv].double()
    total, weight = torch.zeros(SIZE, dtype=torch.float64), 0.0
    for token in np.flatnonzero(reads):
        mine = float(torch.exp(query @ key[token] * states.scale))
        total, weight = total + mine * value[token], weight + mine
    for start in range(0, row // PAGE * PAGE - span + 1, span) if span else ():
        if not reads[start : start + span].any():
            mean_key, mean_value = (each[start : start + span].mean(dim=0) for each in (key, value))
            mine = span * float(torch.exp(query @ mean_key * states.scale))
            total, weight = total + mine * mean_value, weight + mine
    return total / weight


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr("dam_vllm.masks.tails.SPAN", 32)


@pytest.mark.parametrize("estimate", list(Estimate))
def test_estimates_are_their_definition(rng, random_masks, states, estimate):
    masks = random_masks(layers=1, share=0.02, tails=True)
    tokens, prompt, period = states.query.shape[1], 287, 24 if estimate in DELTAS else 0
    served = estimate.tails(masks)
    found = Estimated(served, PAGE, prompt, None, period)(states)
    tails = {"fitted": masks.tails[0].tolist(), "tail": [1, 1], "both": [1, 1]}
    spans = [32 * has for has in tails.get(estimate, [0, 0]) for _ in range(2)]
    reads = page_mask(masks, 0, 0, tokens, PAGE)
    causal = np.tri(tokens, dtype=bool)
    for head in range(4):
        for row in [0, 15, 160, *rng.choice(tokens, 5), 286, 287, tokens - 1]:
            span = spans[head]
            expected = naive(states, reads[head, row], head, row, span)
            if period and row < prompt:
                first = row // period * period
                expected += naive(states, causal[first], head, first, 0)
                expected -= naive(states, reads[head, first], head, first, span)
            np.testing.assert_allclose(found[head, row], expected, rtol=1e-4, atol=1e-5)


def test_what_is_compared_alone_is_the_same(random_masks, states):
    """Delta rows that are not compared themselves are computed all the same."""
    masks, rows = random_masks(layers=1, share=0.02, tails=True), [3, 77, 200, 299]
    whole = Estimated(masks, PAGE, 290, None, 24)(states)
    some = Estimated(masks, PAGE, 290, rows, 24)(states)
    torch.testing.assert_close(some[:, rows], whole[:, rows])


def test_what_an_estimate_costs_is_counted(random_masks, states):
    masks = Estimate.TAIL.tails(random_masks(layers=1, share=0.02))
    hook = Estimated(masks, PAGE, 300, None, 24)
    hook(states)
    reads = page_mask(masks, 0, 0, 300, PAGE)[::2]
    for head in range(2):
        read, tail, causal = 0, 0, 0
        for row in range(300):
            own = row // PAGE
            pages = [reads[head, row, page * PAGE] for page in range(own + 1)]
            read, causal = read + sum(pages), causal + own + 1
            tail += sum(not any(pages[at : at + 2]) for at in range(0, own - 1, 2))
        assert hook.read[0, head] == pytest.approx(read / causal)
        extra = tail / (causal * PAGE) + (1 - read / causal) / 24
        assert hook.extra[0, head] == pytest.approx(extra)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(Random(0).choices(WORDS, k=500)))
    return file


def test_a_model_is_measured_under_every_estimate(tmp_path, random_masks, text):
    model, tokenizer = build("gqa"), save_tokenizer(tmp_path)
    prepare(model)
    masks = random_masks(
        layers=3, share=0.002, dynamic=True, reuse=True, tails=True, head_size=SIZE
    )
    masks.tails[0], masks.tails[1:] = 1, 0
    # So little that all heads leave spans unread.
    masks.dynamic.floors[:], masks.dynamic.caps[:] = 0, 32
    masks.header.parameters["fit"] = {"page": 32}
    case = mass.Case(text, 200, 2, 1, list(Estimate), 24)
    advanced = []
    rows = list(mass.measure(case, [masks], model, tokenizer, lambda: advanced.append(1)))
    assert [row["estimate"] for row in rows] == ["none", "fitted", "tail", "delta", "both"]
    assert len(advanced) == 5
    none, fitted, tail, delta, both = rows
    assert none["extra"] == 0 < fitted["extra"] < tail["extra"] < both["extra"]
    assert 0 < delta["extra"] < both["extra"]
    assert len({row["kl"] for row in rows}) == 5
    assert all(row["kl"] > 0 and 0 < row["read"] < 1 for row in rows)


def test_what_reads_everything_agrees_with_itself(tmp_path, text):
    folder = tmp_path / "model"
    build("gqa").save_pretrained(folder)
    save_tokenizer(folder)
    file = tmp_path / "dense.safetensors"
    masks, case = dense(str(folder)), mass.Case(text, 100, 1, 0, [Estimate.BOTH], 24)
    save_mask_set(masks, file)
    masks.header.parameters["fit"] = {"page": 32}
    save_mask_set(masks, file)
    (row,) = mass.measure_file(case, str(folder), file, [None], lambda: None)
    assert row["kl"] == pytest.approx(0, abs=1e-9)
    assert (row["top1"], row["read"], row["extra"], row["replies"]) == (1, 1, 0, None)
    with pytest.raises(OptionError, match=r"must have at least 900 for --windows 9 of 100 tokens"):
        list(mass.measure_file(mass.Case(text, 100, 9, 0, [], 1), str(folder), file, [None],
                               lambda: None))  # fmt: skip
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=r"--text is '.*', must be a UTF-8 text file"):
        list(mass.measure_file(case, str(folder), file, [None], lambda: None))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--estimates", "tail,guess"], "--estimates is 'tail,guess': must be comma-separated"),
        (["--length", "100"], "--length is 100: must be at least 1024 tokens"),
        (["--masks", "/gone"], "--masks is '/gone': must be an existing file"),
        (["--densities", "2"], "--densities is '2'"),
    ],
)
def test_options_are_checked(text, options, said):
    from dam_vllm.demo import model_dir

    arguments = ["mass", str(model_dir()), "--text", str(text), *options]
    result = CliRunner().invoke(bench.app, arguments)
    assert isinstance(result.exception, OptionError)
    assert said in str(result.exception)
