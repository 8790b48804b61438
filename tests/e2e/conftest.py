"""Real servers: one at a time, each asked once a session and stopped."""

import functools
import json
import os
import random
from dataclasses import dataclass

import httpx
import numpy as np
import openai
import pytest

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import dense
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.server import Server
from tests.conftest import fresh_seed, random_mask_set

PAGE = 32
LENGTHS = (3001, 1537, 777, 150, 1999)
NEW_TOKENS = 80
COMMON = (
    f"--block-size={PAGE}",
    "--max-model-len=4096",
    "--max-num-seqs=8",
    "--no-enable-log-requests",
)


@dataclass(frozen=True)
class Setup:
    """A server's configuration; hashable, so that each is started once.

    Attributes:
        masks: "random", "dynamic", "dense", or None for the stock backend.
        options: further options of the backend, as JSON.
        chunk: most tokens of a step.
        prefix_caching: whether prompts found in the cache are reused.
        eager: no torch.compile.
        pages: size of the cache, in pages.
        tensor_parallel: ranks.
        dtype: of weights and activations.
        cache_dtype: of the KV cache.
        new: tokens that each prompt is answered with.
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


@dataclass(frozen=True)
class Answers:
    """What a server answered: token ids and log-probabilities, alone, then all at once."""

    alone: list[tuple[list[str], list[float]]]
    together: list[tuple[list[str], list[float]]]
    metrics: str
    log: str

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric."""
        lines = (line for line in self.metrics.splitlines() if line.startswith(name))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.fixture(scope="session")
def seed():
    """One seed a session for prompts and masks; printed where a test fails."""
    return fresh_seed()


@pytest.fixture(scope="session")
def mask_files(tmp_path_factory, seed):
    """Random masks, the same with dynamic heads, and dense ones for the demo model."""
    folder = tmp_path_factory.mktemp("masks")
    model = str(model_dir())
    rng = np.random.default_rng(seed)
    files = {name: folder / f"{name}.safetensors" for name in ("random", "dynamic", "dense")}
    for name in ("random", "dynamic"):
        masks = random_mask_set(
            rng, 4, 8, 4, pcl=333, share=0.006, dense=True, dynamic=name == "dynamic",
            head_size=32, fingerprint=fingerprint(model),
        )  # fmt: skip
        save_mask_set(masks, files[name])
    save_mask_set(dense(model), files["dense"])
    return files


@pytest.fixture(scope="session")
def prompts(seed):
    rng = random.Random(seed)
    return [[1, *(rng.randrange(300, 2300) for _ in range(length - 1))] for length in LENGTHS]


@pytest.fixture(scope="session")
def answers(mask_files, prompts, seed):
    """Function from a Setup to its Answers."""
    print(f"seed {seed}")

    @functools.cache
    def ask(setup):
        with Server(model_dir(), arguments(setup, mask_files), environment(setup)) as server:
            client = openai.OpenAI(base_url=server.url, api_key="-", timeout=300)
            alone = [complete(client, [prompt], setup.new)[0] for prompt in prompts]
            together = complete(client, prompts, setup.new)
            metrics = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
            return Answers(alone, together, metrics, server.output())

    return ask


def arguments(setup, mask_files):
    """Command line of `vllm serve`."""
    result = [
        *COMMON,
        f"--max-num-batched-tokens={setup.chunk}",
        f"--kv-cache-memory-bytes={setup.pages * page_bytes(setup)}",
        f"--tensor-parallel-size={setup.tensor_parallel}",
        f"--dtype={setup.dtype}",
        f"--kv-cache-dtype={setup.cache_dtype}",
        "--enable-prefix-caching" if setup.prefix_caching else "--no-enable-prefix-caching",
    ]
    if setup.eager:
        result.append("--enforce-eager")
    if setup.masks:
        options = {"masks": str(mask_files[setup.masks])} | json.loads(setup.options)
        result += ["--attention-backend=dam", "--additional-config", json.dumps({"dam": options})]
    return result


def page_bytes(setup):
    """Bytes of a page of the demo model's cache: layers, KV heads, tokens, keys and values."""
    width = {"bfloat16": 2, "float32": 4}[setup.dtype] if setup.cache_dtype == "auto" else 1
    return 4 * 4 * PAGE * 2 * 32 * width


def environment(setup):
    """Variables of the server.

    By default vLLM's CPU kernel splits a sequence over its threads, where it has several, by what
    else a step holds, so that a request rounds differently in a batch. Answers are compared bit for
    bit in bfloat16, which therefore runs without; float32 keeps the default.
    """
    result = {}
    if setup.dtype == "bfloat16":
        result["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    if setup.tensor_parallel > 1:
        cores = sorted(os.sched_getaffinity(0))
        ranks = [str(cores[rank % len(cores)]) for rank in range(setup.tensor_parallel)]
        result["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
    return result


def complete(client, prompts, new):
    """Greedy completions of token ids, in one request: tokens and log-probabilities of each."""
    reply = client.completions.create(
        model=str(model_dir()),
        prompt=prompts,
        max_tokens=new,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    return [(choice.logprobs.tokens, choice.logprobs.token_logprobs) for choice in choices]
