"""With pages freed the answers are those without, in memory that is too small without."""

import functools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dam_vllm.demo import model_dir
from dam_vllm.engine.kv_free.bounds import Bounds, head_bounds
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import MASKS_IN_MODEL
from tests.conftest import needs_fp8_on_cpu, random_mask_set
from tests.e2e.conftest import PAGE
from tests.interpreted_triton import V2

pytestmark = pytest.mark.e2e

ROUNDING, FP8_ROUNDING = 2e-3, 0.02
LONG = 16384
# Bytes of a page of all the demo model's heads in float32: 4 layers, 4 KV heads of 32 channels.
PAGE_BYTES = 16 * PAGE * 2 * 32 * 4
NEW_TOKENS = 24
# What an engine is asked beside prompts (tests/e2e/engines.py).
ASKED = {"new", "poison", "cancel", "sliding_window"}


@pytest.fixture(scope="module")
def masks(tmp_path_factory, seed):
    """Mask files: of all modes, with tails; static; dense in every other layer; the demo's own."""
    print(f"seed {seed}")
    folder = tmp_path_factory.mktemp("bounded")
    rng = np.random.default_rng(seed)
    identity = fingerprint(str(model_dir()))
    static = random_mask_set(rng, 4, 8, 4, pcl=333, share=0.006, fingerprint=identity)
    modes = static.modes.copy()
    modes[0] = [HeadMode.DYNAMIC, HeadMode.STATIC, HeadMode.DENSE, HeadMode.DYNAMIC]
    modes[2] = [HeadMode.REUSE, HeadMode.DYNAMIC, HeadMode.STATIC, HeadMode.REUSE]
    anchors = np.full((4, 4, 2), -1, np.int32)
    anchors[2, 0], anchors[2, 3] = (0, 0), (0, 3)
    mixed = random_mask_set(
        rng, 4, 8, 4, pcl=333, share=0.006, dynamic=True, head_size=32, fingerprint=identity
    )
    tails = np.zeros((4, 4), np.uint8)
    tails[0, 0] = tails[1, 2] = tails[2, 3] = 1
    save_mask_set(static, folder / "static")
    save_mask_set(replace(mixed, modes=modes, anchors=anchors, tails=tails), folder / "mixed")
    static.modes[::2] = HeadMode.DENSE
    save_mask_set(static, folder / "halves")
    made = {name: str(folder / name) for name in ("static", "mixed", "halves")}
    return made | {"fitted": str(model_dir() / MASKS_IN_MODEL)}


@pytest.fixture(scope="module")
def run(masks, seed, run_engine):
    """Function that runs an engine once a setup: its result, and its log."""

    @functools.cache
    def start(text, v2):
        return run_engine(json.loads(text), V2 if v2 else {})

    def ask(lengths, free, kind="mixed", rounds=1, alone=False, v2=False, fails=False, **setup):
        rng = random.Random(seed)
        prompts = [[1, *(rng.randrange(300, 2300) for _ in range(n - 1))] for n in lengths]
        asked = {name: setup.pop(name) for name in ASKED & setup.keys()}
        asked["batches"] = [[prompt] for prompt in prompts] if alone else [prompts] * rounds
        asked["arguments"] = arguments(masks[kind], kv_free=free, **setup)
        result, log = start(json.dumps({"new": NEW_TOKENS} | asked, sort_keys=True), v2)
        assert ("failed" in result) == fails, log[-6000:]
        return result, log

    return ask


def arguments(
    masks,
    pages=1200,
    length=LONG,
    chunk=1024,
    ranks=1,
    dtype="float32",
    cache_dtype="auto",
    prefix_caching=False,
    **options,
):
    """Keyword arguments of `LLM`; what has no name here is an option of the backend."""
    return {
        "model": str(model_dir()),
        "dtype": dtype,
        "kv_cache_dtype": cache_dtype,
        "tensor_parallel_size": ranks,
        "attention_backend": "dam",
        "block_size": PAGE,
        "max_model_len": length,
        "hf_overrides": {"max_position_embeddings": length},
        "max_num_seqs": 8,
        "max_num_batched_tokens": chunk,
        "kv_cache_memory_bytes": int(pages * PAGE_BYTES),
        "enable_prefix_caching": prefix_caching,
        "enforce_eager": True,
        "additional_config": {"dam": {"masks": masks, "dense_below": 0, **options}},
    }


def assert_close(first, second, rounding=ROUNDING, of=np.max):
    """Equal within rounding as long as the tokens agree; they may part at a tie.

    Args:
        first: what an engine told.
        second: what another told.
        rounding: bound of the differences of log-probabilities.
        of: what of them is bound.
    """
    agreed, differences = 0, []
    answers = [
        [each for batch in result["answers"] for each in batch] for result in (first, second)
    ]
    for one, other in zip(*answers, strict=True):
        for at, (token, same) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            ours, theirs = one["logprobs"][at], other["logprobs"][at]
            shared = ours.keys() & theirs.keys()
            assert len(shared) >= 3
            differences += [abs(ours[key] - theirs[key]) for key in shared]
            if token != same:
                break
            agreed += 1
    assert of(differences) < rounding
    assert agreed > sum(len(one["tokens"]) for one in answers[0]) * 0.8


def assert_whole(result):
    assert result["free"] == result["pages"]


LENGTHS = (16000, 777, 2999, 1537)
# 780 pages hold one request of 16k tokens and a half where nothing is freed.
SMALL = 480


@pytest.mark.parametrize(
    ("free", "kind"),
    [("layer", "mixed"), ("head", "mixed"), ("head", "static"), ("head", "fitted")],
)
def test_equal_in_memory_that_is_too_small_without(run, free, kind):
    """Freed pages are filled with NaN: a stale id that is dereferenced would be seen."""
    expected, _ = run(LENGTHS, "off", kind)
    found, log = run(LENGTHS, free, kind, pages=SMALL, poison=True)
    assert "DAM frees KV pages" in log
    assert found["poisoned"] > 0
    assert_close(expected, found)
    assert_whole(found)


def test_too_small_without(run):
    _, log = run((100,), "off", pages=SMALL, fails=True)
    assert "larger than the available KV cache memory" in log


def test_a_sliding_window_differs(run):
    """The negative control: without sinks the answers are others."""
    expected, _ = run(LENGTHS, "off", "static")
    found, _ = run(LENGTHS, "head", "static", pages=SMALL, sliding_window=True)
    with pytest.raises(AssertionError):
        assert_close(expected, found)


SHORTER = (3001, 1999, 1537, 777, 150)


@pytest.mark.parametrize("v2", [False, True])
def test_prefix_cache_preemption_and_cancellation(run, masks, v2):
    """In chunks that end inside pages; all prompts fit into the pool, what is generated not.

    By both of vLLM's model runners. Freed pages are filled with NaN.
    """
    new, setup = 64, {"length": 4096, "chunk": 500, "kind": "halves", "rounds": 2}
    needed = pages_held(load_mask_set(Path(masks["halves"])), [n + new - 1 for n in SHORTER])
    expected, _ = run(SHORTER, "off", new=new, **setup)
    changed = {"prefix_caching": True, "cancel": True, "pages": (needed - 3) / 2}
    found, log = run(SHORTER, "head", new=new, poison=True, v2=v2, **changed, **setup)
    assert "by whole layers (2 of 4)" in log
    assert found["poisoned"] > 0
    assert found["preempted"] > 0
    assert found["hits"] > 1000
    assert_close(expected, found)
    assert_whole(found)


def pages_held(masks, lengths):
    """Pages of two layers each that requests hold in the end where every other layer frees."""
    heads = head_bounds(masks, PAGE, 0)
    sinks, window = int(heads.sinks[1::2].max()), int(heads.window[1::2].max())
    bounds = Bounds(PAGE, heads.query_block, sinks, window, heads.start)
    held = 0
    for tokens in lengths:
        first, last = bounds.unread(tokens)
        held += 2 * -(-tokens // PAGE) - (last - first)
    return held


@needs_fp8_on_cpu
def test_fp8_cache_and_dense_requests(run):
    """Requests below `dense_below` read everything, bit for bit as where all do."""
    setup = {"dtype": "float16", "cache_dtype": "fp8", "dense_below": 1600, "length": 8192}
    expected, _ = run(SHORTER, "off", alone=True, **setup)
    found, log = run(SHORTER, "head", alone=True, poison=True, **setup)
    assert "units of 1 KV heads" in log
    assert found["poisoned"] > 0
    # Rounding may move a key by a step of fp8, of an eighth, and with it single log-probabilities.
    assert_close(expected, found, FP8_ROUNDING, np.mean)
    assert_whole(found)
    dense, _ = run(SHORTER, "off", alone=True, **setup | {"dense_below": 8192})
    for length, mine, all_read in zip(SHORTER, expected["answers"], dense["answers"], strict=True):
        if length + NEW_TOKENS < 1600:
            assert mine == all_read


def test_model_runner_v2(run, masks):
    """Pages freed by head and filled with NaN."""
    setup = {"kind": "mixed", "new": 12, "length": 4096}
    expected, _ = run(LENGTHS[1:], "off", **setup)
    found, log = run(LENGTHS[1:], "head", poison=True, v2=True, **setup)
    assert "DAM frees KV pages" in log
    assert found["poisoned"] > 0
    assert_close(expected, found)
    assert_whole(found)


def test_tensor_parallel(run):
    """Two ranks that free pages answer as one that keeps them."""
    expected, _ = run(LENGTHS, "off", "mixed")
    found, log = run(LENGTHS, "head", "mixed", ranks=2)
    assert "DAM frees KV pages" in log
    assert_close(expected, found)
    assert_whole(found)
