"""What serving must not depend on, and what it must be equal to, over HTTP."""

import numpy as np
import pytest

from tests.e2e.conftest import LENGTHS, NEW_TOKENS, Setup

pytestmark = pytest.mark.e2e

BF16_ROUNDING = 0.08


def assert_same(first, second):
    """Tokens equal and log-probabilities bit for bit."""
    for (tokens, logprobs), (others, other_logprobs) in zip(first, second, strict=True):
        assert len(tokens) == NEW_TOKENS
        assert tokens == others
        assert logprobs == other_logprobs


def assert_close(first, second):
    """Log-probabilities within rounding as long as the tokens agree; they may part at a tie."""
    agreed = 0
    for (tokens, logprobs), (others, other_logprobs) in zip(first, second, strict=True):
        same = [a == b for a, b in zip(tokens, others, strict=True)]
        until = same.index(False) if False in same else len(same)
        agreed += until
        difference = np.abs(np.subtract(logprobs[: until + 1], other_logprobs[: until + 1]))
        assert difference.max() < BF16_ROUNDING
    assert agreed > 0.5 * len(first) * NEW_TOKENS


def test_all_pages_equal_the_stock_backend(answers):
    stock, dense = answers(Setup(masks=None)), answers(Setup(masks="dense"))
    assert_close(stock.alone, dense.alone)
    assert_close(stock.together, dense.together)


def test_sparse_differs_from_dense(answers):
    """The masks of these tests do leave something out."""
    sparse, dense = answers(Setup()), answers(Setup(masks="dense"))
    assert sparse.alone != dense.alone
    with pytest.raises(AssertionError):
        assert_close(sparse.alone, dense.alone)


@pytest.mark.parametrize("chunk", [500, 1000])
def test_chunked_prefill(answers, chunk):
    assert_same(answers(Setup(chunk=chunk)).alone, answers(Setup()).alone)


def test_mixed_batch(answers):
    assert_same(answers(Setup()).together, answers(Setup()).alone)
    assert_same(answers(Setup(chunk=500)).together, answers(Setup()).alone)


def test_prefix_cache(answers):
    cached = answers(Setup(prefix_caching=True))
    assert cached.metric("vllm:prefix_cache_hits_total") > sum(LENGTHS) * 0.8
    assert_same(cached.alone, answers(Setup()).alone)
    assert_same(cached.together, answers(Setup()).alone)


def test_preemption(answers):
    preempted = answers(Setup(pages=sum(LENGTHS) // 32 + 4))
    assert preempted.metric("vllm:num_preemptions_total") > 0
    assert_same(preempted.together, answers(Setup()).alone)


def test_naive_kernel(answers):
    naive = answers(Setup(options='{"dense_below": 0, "kernel": "naive"}'))
    assert_close(naive.alone, answers(Setup()).alone)
    assert_close(naive.together, answers(Setup()).together)


def test_tensor_parallel(answers):
    assert_close(answers(Setup(tensor_parallel=2)).alone, answers(Setup()).alone)


def test_compiled(answers):
    assert_close(answers(Setup(eager=False)).alone, answers(Setup()).alone)


def test_short_requests_run_dense(answers):
    """Below dense_below everything is read, whatever the masks say; beyond it, it is not."""
    limited = answers(Setup(options='{"dense_below": 2048}')).alone
    dense, sparse = answers(Setup(masks="dense")).alone, answers(Setup()).alone
    short = [row for row, length in enumerate(LENGTHS) if length + NEW_TOKENS <= 2048]
    assert_close([limited[row] for row in short], [dense[row] for row in short])
    assert limited[0] != dense[0]
    assert limited[0] != sparse[0]


def test_start_up_table(answers):
    log = answers(Setup()).log
    assert "DAM masks" in log
    assert "PCL 333, page 32, dense below 0, kernel auto; density at 4096 tokens" in log
    assert "1 dense" in log
    assert "DAM masks" not in answers(Setup(masks=None)).log
