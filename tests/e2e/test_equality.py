"""What serving must not depend on, and what it must be equal to."""

import numpy as np
import pytest

from tests.conftest import needs_fp8_on_cpu, rows_round_alike
from tests.e2e.conftest import LENGTHS, NEW_TOKENS, PAGE, Setup

pytestmark = pytest.mark.e2e

# Random prompts leave the model unsure, so that bf16 rounding moves its log-probabilities far.
BF16_ROUNDING, FP32_ROUNDING = 0.25, 2e-3
# The oracle takes long a token, whatever its place; the first ones are computed as the others. It
# computes request by request.
NAIVE = {"options": '{"dense_below": 0, "kernel": "naive"}', "new": 8, "together": False}


# Pages that hold all prompts, but not what is generated.
FULL = sum(-(-length // PAGE) for length in LENGTHS) + 1


# Masks whose heads choose pages.
CHOOSING = ("dynamic", "reuse")
# What is asked alone and whole, in chunks or beside others: bit for bit where linear layers allow
# that, else within what float32 rounds.
IN_BATCH = {} if rows_round_alike() else {"dtype": "float32"}


def assert_same(first, second):
    """Tokens equal and log-probabilities bit for bit."""
    for (tokens, logprobs), (others, other_logprobs) in zip(first, second, strict=True):
        assert len(tokens) == NEW_TOKENS
        assert tokens == others
        assert logprobs == other_logprobs


def assert_same_in_batch(first, second):
    """As `assert_same`, where linear layers round a row alike whatever is beside it."""
    if rows_round_alike():
        assert_same(first, second)
    else:
        assert_close(first, second, FP32_ROUNDING)


def distance(first, second, of=np.max):
    """Differences of log-probabilities as far as the tokens agree, and the share that does.

    The second may be answered with fewer tokens. Of the differences, what `of` tells.
    """
    agreed, differences, new = 0, [], len(second[0][0])
    for (tokens, logprobs), (others, other_logprobs) in zip(first, second, strict=True):
        same = [a == b for a, b in zip(tokens[:new], others, strict=True)]
        until = same.index(False) if False in same else len(same)
        agreed += until
        end = min(until + 1, new)
        differences += np.abs(np.subtract(logprobs[:end], other_logprobs[:end])).tolist()
    return of(differences), agreed / len(first) / new


def assert_close(first, second, rounding=BF16_ROUNDING):
    """Equal within rounding as long as the tokens agree; they may part at a tie."""
    largest, agreed = distance(first, second)
    assert largest < rounding
    assert agreed > (0.5 if rounding == FP32_ROUNDING else 0.2)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", FP32_ROUNDING), ("bfloat16", None)])
def test_all_pages_equal_the_stock_backend(answers, dtype, rounding):
    stock = answers(Setup(masks=None, dtype=dtype))
    dense = answers(Setup(masks="dense", dtype=dtype))
    assert_close(stock.alone, dense.alone, rounding or BF16_ROUNDING)
    assert_close(stock.together, dense.together, rounding or BF16_ROUNDING)


@pytest.mark.parametrize("masks", ["random", "reuse"])
def test_guessed_tokens_change_nothing(answers, masks):
    """N-gram speculation: several new tokens of a request are verified in one step."""
    plain, guessed = (answers(Setup(masks, dtype="float32", guessed=each)) for each in (0, 3))
    assert (plain.guesses, guessed.guesses > 50) == (0, True)
    naive = answers(Setup(masks, dtype="float32", **NAIVE))
    for other in (plain, naive):
        assert_close(guessed.alone, other.alone, FP32_ROUNDING)
    assert_close(guessed.together, plain.together, FP32_ROUNDING)


def test_guessed_tokens_of_all_pages_equal_the_stock_backend(answers):
    stock, dense = (answers(Setup(masks, dtype="float32", guessed=3)) for masks in (None, "dense"))
    assert min(stock.guesses, dense.guesses) > 50
    assert_close(dense.alone, stock.alone, FP32_ROUNDING)
    assert_close(dense.together, stock.together, FP32_ROUNDING)


def test_sparse_differs_from_dense(answers):
    """The masks of these tests do leave something out."""
    sparse, dense = answers(Setup(dtype="float32")), answers(Setup("dense", dtype="float32"))
    with pytest.raises(AssertionError):
        assert_close(sparse.alone, dense.alone, FP32_ROUNDING)


@pytest.mark.parametrize(
    ("masks", "chunk"), [("random", 500), ("random", 1000), ("dynamic", 500), ("reuse", 500)]
)
def test_chunked_prefill(answers, masks, chunk):
    chunked = answers(Setup(masks, chunk=chunk, together=chunk == 500, **IN_BATCH))
    assert_same_in_batch(chunked.alone, answers(Setup(masks, **IN_BATCH)).alone)


@pytest.mark.parametrize("masks", ["random", *CHOOSING])
def test_mixed_batch(answers, masks):
    asked = answers(Setup(masks, **IN_BATCH))
    assert_same_in_batch(asked.together, asked.alone)


@pytest.mark.parametrize("masks", ["random", *CHOOSING])
def test_mixed_batch_in_chunks(answers, masks):
    chunked, whole = (answers(Setup(masks, chunk=each, **IN_BATCH)) for each in (500, Setup.chunk))
    assert_same_in_batch(chunked.together, whole.alone)


@pytest.mark.parametrize("masks", ["random", *CHOOSING])
def test_prefix_cache(answers, masks):
    cached = answers(Setup(masks, prefix_caching=True, **IN_BATCH))
    alone = answers(Setup(masks, **IN_BATCH)).alone
    assert cached.hits > sum(LENGTHS) * 0.8
    assert_same(cached.alone, alone)
    assert_same_in_batch(cached.together, alone)


def test_preemption(answers):
    preempted = answers(Setup(pages=FULL, alone=False, **IN_BATCH))
    assert preempted.preempted > 0
    assert_same_in_batch(preempted.together, answers(Setup(**IN_BATCH)).alone)


def test_preemption_of_reusing_heads(answers):
    """Against the naive kernel: computed again, generated tokens choose a page at a time."""
    change = {"pages": FULL, "dtype": "float32", "new": 12, "alone": False, "together": True}
    fast, naive = answers(Setup("reuse", **change)), answers(Setup("reuse", **NAIVE | change))
    assert fast.preempted == naive.preempted > 0
    assert_close(fast.together, naive.together, FP32_ROUNDING)


@pytest.mark.parametrize("masks", ["random", "dynamic", "reuse"])
def test_naive_kernel(answers, masks):
    fast = answers(Setup(masks, dtype="float32"))
    naive = answers(Setup(masks, dtype="float32", **NAIVE))
    assert_close(fast.alone, naive.alone, FP32_ROUNDING)
    assert_close(fast.together, naive.alone, FP32_ROUNDING)


# What V2 runs under the interpreter takes long a token.
V2 = {"v2": True, "dtype": "float32", "new": 12}


@pytest.mark.parametrize("masks", ["random", "dynamic"])
def test_model_runner_v2(answers, masks):
    """In chunks, with prefixes found in the cache."""
    first = answers(Setup(masks, dtype="float32"))
    second = answers(Setup(masks, chunk=500, prefix_caching=True, **V2))
    assert second.hits > sum(LENGTHS) * 0.8
    assert_close(first.alone, second.alone, FP32_ROUNDING)
    assert_close(first.together, second.together, FP32_ROUNDING)


def test_model_runner_v2_preempts(answers):
    second = answers(Setup(pages=FULL, alone=False, **{**V2, "new": 40}))
    assert second.preempted > 0
    assert_close(answers(Setup(dtype="float32")).together, second.together, FP32_ROUNDING)


@needs_fp8_on_cpu
@pytest.mark.parametrize(("masks", "other"), [("random", "oracle"), ("dense", "stock")])
def test_fp8_cache(answers, masks, other):
    rounded = {"cache_dtype": "fp8", "dtype": "float16"}
    same = Setup("random", **NAIVE, **rounded) if other == "oracle" else Setup(None, **rounded)
    ours = answers(Setup(masks, **rounded)).alone
    # Rounding may move a key by a step of fp8, of an eighth, and with it single log-probabilities.
    near, _ = distance(ours, answers(same).alone, np.mean)
    far, _ = distance(ours, answers(Setup(masks, dtype="float32")).alone, np.mean)
    assert 4 * near < far


# Masks, and what else must say the same: stock vLLM's dense attention, or the oracle.
OTHERS = {
    "dense": Setup(None, dtype="float32"),
    "dynamic": Setup("dynamic", dtype="float32", **NAIVE),
}


@pytest.mark.parametrize(
    ("masks", "change"),
    [
        ("dense", {"tensor_parallel": 2}),
        ("random", {"tensor_parallel": 2}),
        ("dynamic", {"tensor_parallel": 2}),
        ("dynamic", {"eager": False}),
    ],
)
def test_tensor_parallel_and_compiled(answers, masks, change):
    """In float32, where what rounds elsewhere stays small."""
    changed = answers(Setup(masks, dtype="float32", together=False, **change)).alone
    for other in (Setup(masks, dtype="float32"), OTHERS.get(masks)):
        if other:
            assert_close(changed, answers(other).alone, FP32_ROUNDING)


def test_short_requests_run_dense(answers):
    """Below dense_below everything is read, whatever the masks say; beyond it, it is not."""
    options = '{"dense_below": 896}'
    limited = answers(Setup(options=options, dtype="float32", together=False)).alone
    dense = answers(Setup("dense", dtype="float32")).alone
    sparse = answers(Setup(dtype="float32")).alone
    short = [row for row, length in enumerate(LENGTHS) if length + NEW_TOKENS <= 896]
    assert_close([limited[row] for row in short], [dense[row] for row in short], FP32_ROUNDING)
    for other in (dense, sparse):
        largest, _ = distance(limited[:1], other[:1])
        assert largest > FP32_ROUNDING


def test_start_up_table(answers):
    """With an option of its own, since a process tells the same table once."""
    own = {"options": '{"dense_below": 64}', "alone": False, "together": False}
    log = answers(Setup(**own)).log
    assert "DAM masks" in log
    assert "PCL 333, page 32, dense below 64, kernel auto; density at 4096 tokens" in log
    assert "1 dense" in log
    assert "DAM masks" not in answers(Setup(masks=None)).log
    dynamic = answers(Setup("dynamic", **own)).log
    assert "8 dynamic KV heads: their keys are stored rotated, 0.03 MiB of bases" in dynamic
