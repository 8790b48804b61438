"""Engines by their setup: each is built and asked once a session."""

import functools
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import dense
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from tests.conftest import fresh_seed, random_mask_set
from tests.e2e.engine_run import RESULT
from tests.e2e.engines import DONE
from tests.interpreted_triton import V2

PAGE = 32
# Each prompt's answer goes over the end of a page. With it a prompt has no more keys than the stock
# kernel rounds alike wherever queries are cut (tests/engine/test_stock_kernel.py).
LENGTHS, NEW_TOKENS = (1163, 1037, 777, 150, 911), 40


@dataclass(frozen=True)
class Setup:
    """An engine's configuration; hashable, so that each is built once.

    Attributes:
        masks: "random", "dynamic", "reuse", "dense", or None for the stock backend.
        options: further options of the backend, as JSON.
        chunk: most tokens of a step.
        prefix_caching: whether prompts found in the cache are reused.
        eager: no torch.compile.
        pages: size of the cache, in pages.
        tensor_parallel: ranks.
        dtype: of weights and activations.
        cache_dtype: of the KV cache.
        new: tokens that each prompt is answered with.
        v2: whether vLLM takes its Model Runner V2.
        guessed: tokens that are guessed from n-grams at a time, and verified in one step.
        alone: whether each prompt is asked alone.
        together: whether all prompts are asked at once.
    """

    masks: str | None = "random"
    options: str = '{"dense_below": 0}'
    chunk: int = 8192
    prefix_caching: bool = False
    eager: bool = True
    pages: int = 2000
    tensor_parallel: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "auto"
    new: int = NEW_TOKENS
    v2: bool = False
    guessed: int = 0
    alone: bool = True
    together: bool = True


@dataclass(frozen=True)
class Answers:
    """What an engine answered: token ids and log-probabilities.

    Attributes:
        alone: of each prompt asked alone, or None.
        together: of each prompt, all asked at once afterwards, or None.
        preempted: requests that were preempted.
        hits: tokens that were found in the prefix cache.
        guesses: tokens that were guessed and verified.
        log: what the engine printed.
    """

    alone: list[tuple[list[int], list[float]]] | None
    together: list[tuple[list[int], list[float]]] | None
    preempted: int
    hits: int
    guesses: int
    log: str


@pytest.fixture(scope="session", autouse=True)
def core():
    """Where several workers run tests at a time, each has a core to itself and to its servers.

    A server starts on one core at a time, and idle ones of its processes take others away.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


@pytest.fixture(scope="session")
def seed():
    """One seed a session for prompts and masks."""
    return fresh_seed()


@pytest.fixture(autouse=True)
def told_seed(seed):
    """Prints the seed for each test, which pytest shows where one fails."""
    print(f"seed {seed}")


@pytest.fixture(scope="session")
def mask_files(tmp_path_factory, seed):
    """Random masks, others with dynamic heads, with reusing ones and tails, and dense ones."""
    folder = tmp_path_factory.mktemp("masks")
    model = str(model_dir())
    rng = np.random.default_rng(seed)
    kinds = ("random", "dynamic", "reuse")
    files = {name: folder / f"{name}.safetensors" for name in (*kinds, "dense")}
    for name in kinds:
        masks = random_mask_set(
            rng, 4, 8, 4, pcl=333, share=0.006, dense=True, dynamic=name != "random",
            reuse=name == "reuse", tails=name == "reuse", head_size=32,
            fingerprint=fingerprint(model),
        )  # fmt: skip
        save_mask_set(masks, files[name])
    save_mask_set(dense(model), files["dense"])
    return files


@pytest.fixture(scope="session")
def prompts(seed):
    rng = random.Random(seed)
    return [[1, *(rng.randrange(300, 2300) for _ in range(length - 1))] for length in LENGTHS]


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """Function from variables to a process that has them and builds engines; all end at last."""
    folder = tmp_path_factory.mktemp("engines")
    started = []
    # Two threads, or ranks, as on any machine, where there is one core too.
    cores = sorted(os.sched_getaffinity(0))
    own = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", "OMP_NUM_THREADS": "2"}

    @functools.cache
    def start(variables):
        log = folder / f"{len(started)}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.engines"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=os.environ | own | dict(variables), text=True,
            )  # fmt: skip
        started.append(process)
        return process, log

    yield start
    for process in started:
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def run_engine(engines):
    """Function from what an engine is asked, and variables, to what it told, and to its log."""

    def run(asked, variables):
        process, log = engines(tuple(variables.items()))
        told = log.stat().st_size
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        lines = []
        for line in process.stdout:
            if line.strip() == DONE:
                break
            lines.append(line)
        printed = "".join(lines) + log.read_bytes()[told:].decode(errors="replace")
        found = [line for line in lines if line.startswith(RESULT)]
        assert len(found) == 1, printed[-6000:]
        return json.loads(found[0].removeprefix(RESULT)), printed

    return run


@pytest.fixture(scope="session")
def answers(mask_files, prompts, seed, run_engine):
    """Function from a Setup to its Answers."""
    print(f"seed {seed}")

    @functools.cache
    def ask(setup):
        batches = [[prompt] for prompt in prompts if setup.alone] + [prompts] * setup.together
        asked = {"arguments": arguments(setup, mask_files), "batches": batches, "new": setup.new}
        result, printed = run_engine(asked, environment(setup))
        assert "failed" not in result, printed[-6000:]
        given = [[chosen(each) for each in batch] for batch in result["answers"]]
        together = given.pop() if setup.together else None
        alone = [first for (first,) in given] if setup.alone else None
        counts = (result[name] for name in ("preempted", "hits", "guesses"))
        return Answers(alone, together, *counts, printed)

    return ask


def chosen(answer):
    """Tokens of an answer, and the log-probability of each."""
    pairs = zip(answer["tokens"], answer["logprobs"], strict=True)
    return answer["tokens"], [logprobs[str(token)] for token, logprobs in pairs]


def arguments(setup, mask_files):
    """Keyword arguments of `LLM`."""
    result = {
        "model": str(model_dir()),
        "block_size": PAGE,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": setup.chunk,
        "kv_cache_memory_bytes": setup.pages * page_bytes(setup),
        "tensor_parallel_size": setup.tensor_parallel,
        "dtype": setup.dtype,
        "kv_cache_dtype": setup.cache_dtype,
        "enable_prefix_caching": setup.prefix_caching,
        "enforce_eager": setup.eager,
    }
    if setup.guessed:
        guess = {"method": "ngram", "num_speculative_tokens": setup.guessed}
        result["speculative_config"] = guess | {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    if setup.masks:
        options = {"masks": str(mask_files[setup.masks])} | json.loads(setup.options)
        result |= {"attention_backend": "dam", "additional_config": {"dam": options}}
    return result


def page_bytes(setup):
    """Bytes of a page of the demo model's cache: layers, KV heads, tokens, keys and values."""
    width = {"bfloat16": 2, "float32": 4}[setup.dtype] if setup.cache_dtype == "auto" else 1
    return 4 * 4 * PAGE * 2 * 32 * width


def environment(setup):
    """Variables of the engine's process.

    By default vLLM's CPU kernel splits a generated token's keys over its threads by what else a
    step holds, so that a request rounds differently in a batch. Answers are compared bit for bit in
    bfloat16, which therefore runs without; float32 keeps the default.
    """
    result = dict(V2) if setup.v2 else {}
    if setup.dtype == "bfloat16":
        result["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    return result
