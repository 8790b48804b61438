"""The estimate of KL against the exact one, reading of vLLM's log-probabilities, windows."""

from itertools import pairwise

import numpy as np
import pytest

from dam_vllm.evaluation import agreement, client
from dam_vllm.evaluation.agreement import compare, divergence, text_windows
from dam_vllm.evaluation.client import Logprobs, read_logprobs

POSITIONS = 300


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def told(full, text, top):
    """What a server with `top` likely tokens tells of log-probabilities [n, vocabulary]."""
    count = len(full)
    rows = [None]
    for row, own in zip(full, text, strict=True):
        tokens = {*np.argsort(-row)[:top].tolist(), own}
        rows.append({str(token): {"logprob": float(row[token])} for token in tokens})
    assert len(rows) == count + 1
    return read_logprobs([0, *text], rows)


@pytest.fixture
def pair(rng):
    """Exact log-probabilities of two models that agree mostly, and a text."""

    def make(vocabulary, noise):
        p = rng.normal(size=(POSITIONS, vocabulary)) * 2
        q = p + rng.normal(size=p.shape) * noise
        text = rng.integers(vocabulary, size=POSITIONS).tolist()
        return log_softmax(p), log_softmax(q), text

    return make


@pytest.fixture
def top(monkeypatch):
    def use(count):
        monkeypatch.setattr(client, "TOP", count)
        monkeypatch.setattr(agreement, "TOP", count)
        return count

    return use


def exact(p, q):
    return (np.exp(p) * (p - q)).sum(axis=1)


def test_exact_where_all_tokens_are_told(pair):
    p, q, text = pair(client.TOP, 0.7)
    found = divergence(told(p, text, client.TOP), told(q, text, client.TOP))
    np.testing.assert_allclose(found, exact(p, q), atol=2e-5)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("count", [3, 8])
def test_from_below_and_near_where_some_are_told(pair, top, noise, count):
    p, q, text = pair(30, noise)
    found = divergence(told(p, text, top(count)), told(q, text, count))
    assert (found <= exact(p, q) + 1e-5).all()
    assert (found >= 0).all()
    if count == 8:
        assert found.mean() >= 0.3 * exact(p, q).mean()


def test_disjoint_tops_are_far_apart(top):
    """Dense is sure of a token that the other ranks below its own top."""
    p = log_softmax(np.array([[12.0, 0, 0, 0, 0, 0]]))
    q = log_softmax(np.array([[0, 9.0, 8.0, 0, 0, 0]]))
    found = divergence(told(p, [1], top(2)), told(q, [1], 2))
    # The hidden one has at most the second's .27.
    assert 1.2 < found[0] <= exact(p, q)[0]


def test_compare(pair):
    p, q, text = pair(50, 1.0)
    found = compare(told(p, text, client.TOP), told(q, text, client.TOP))
    assert found["nll"] == pytest.approx(-q[np.arange(POSITIONS), text].mean(), rel=1e-6)
    assert found["top1"] == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    same = compare(told(p, text, client.TOP), told(p, text, client.TOP))
    assert same["top1"] == 1
    assert same["kl"] < 1e-6


def test_reading_keeps_the_texts_own_token_last_where_it_is_unlikely():
    likely = {str(10 + place): {"logprob": -float(place + 1)} for place in range(client.TOP)}
    rows = [None, likely, {**likely, "99": {"logprob": -50.0}}]
    found = read_logprobs([0, 12, 99], rows)
    assert isinstance(found, Logprobs)
    assert found.actual.tolist() == [-3.0, -50.0]
    assert found.tokens[:, 0].tolist() == [10, 10]
    assert found.tokens[:, -1].tolist() == [-1, 99]
    assert found.told[:, -1].tolist() == [-np.inf, -50.0]


def test_windows_are_spread_and_do_not_overlap(tokenizer):
    text = " ".join(str(number) for number in range(3000))
    windows = text_windows(tokenizer, text, 500, 4)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    first = tokenizer.bos_token_id
    assert [len(window) for window in windows] == [500] * 4
    assert all(window[0] == first for window in windows)
    assert windows[0][1:] == ids[:499]
    assert windows[-1][1:] == ids[-499:]
    starts = [index * (len(ids) - 499) // 3 for index in range(4)]
    assert [ids[start : start + 499] for start in starts] == [window[1:] for window in windows]
    assert all(b - a >= 499 for a, b in pairwise(starts))
