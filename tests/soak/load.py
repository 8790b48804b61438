"""Bursts of requests to a server, each answer held against the same request's alone."""

import asyncio
import itertools
import json
import time
from collections import Counter

import httpx
import numpy as np
import psutil

from dam_vllm.demo import model_dir
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.server import Server
from tests.conftest import random_mask_set, rows_round_alike
from tests.soak.client import NEW, Client, Way, draw_filling, draw_requests, draw_way

PAGE, LONGEST = 32, 8192
# The longest request fits, and little beside it.
PAGES = (LONGEST + NEW) // PAGE + 18
# Prompts that are let in together, since they leave some pages, but fewer than they will generate.
FILLING, SPARE = 4, 10
BURST = 20
# Rows of bfloat16 that a CPU multiplies otherwise beside others tell nothing of DAM: float32 then,
# and within its rounding.
DTYPE, ROUNDING = ("bfloat16", 0.0) if rows_round_alike() else ("float32", 2e-3)
# A page's keys and values of 4 layers, 4 KV heads and 32 channels.
CACHE_BYTES = PAGES * 4 * 4 * PAGE * 2 * 32 * (2 if DTYPE == "bfloat16" else 4)
NAMES = ("asked", "streamed", "cut", "lost", "other tokens", "other log-probabilities")


def save_static(path, rng):
    """Random masks of static heads, none of which reads more keys than the kernel rounds alike."""
    identity = fingerprint(str(model_dir()))
    masks = random_mask_set(rng, 4, 8, 4, pcl=333, share=0.0015, fingerprint=identity)
    save_mask_set(masks, path)


def serve(masks, **options):
    """A server with a cache that is too small: the demo model with masks and options, or stock.

    Args:
        masks: a mask file, or None for stock vLLM.
        options: of the backend.
    """
    arguments = ["--enforce-eager", f"--max-model-len={LONGEST + NEW}", f"--block-size={PAGE}"]
    arguments += [f"--kv-cache-memory-bytes={CACHE_BYTES}", f"--dtype={DTYPE}"]
    arguments += ["--max-num-batched-tokens=2048", "--max-num-seqs=16"]
    arguments += ["--hf-overrides", json.dumps({"max_position_embeddings": LONGEST + NEW})]
    if masks:
        options |= {"masks": str(masks), "dense_below": 0}
        arguments += ["--attention-backend=dam"]
        arguments += ["--additional-config", json.dumps({"dam": options})]
    return Server(model_dir(), arguments, {"VLLM_CPU_ATTN_SPLIT_KV": "0"})


def resident(server):
    """Memory of the server's processes, in MiB."""
    root = psutil.Process(server.pid)
    return sum(each.memory_info().rss for each in [root, *root.children(recursive=True)]) / 2**20


def compare(request, way, answer, alone, counts):
    """Counts what became of a request; an answer of None is lost.

    Log-probabilities are others beyond `ROUNDING`.
    """
    counts["asked"] += 1
    counts["streamed"] += way.stream
    if answer is None:
        counts["lost"] += 1
        return
    came = len(answer.tokens)
    if not way.whole:
        counts["cut"] += 1
    elif came != request.new:
        counts["lost"] += 1
    if came and answer.tokens != alone.tokens[:came]:
        counts["other tokens"] += 1
    elif came and np.abs(np.subtract(answer.logprobs, alone.logprobs[:came])).max() > ROUNDING:
        counts["other log-probabilities"] += 1


async def burst(client, rows, ways, requests, alone, counts):
    """Sends requests at once, each in its own way."""

    async def ask(row, way):
        try:
            return await client.ask(requests[row], way)
        except httpx.HTTPError as error:
            print(f"no answer to {len(requests[row].prompt)} tokens, {way}: {error!r}", flush=True)
            return None

    answers = await asyncio.gather(*map(ask, rows, ways))
    for row, way, answer in zip(rows, ways, answers, strict=True):
        compare(requests[row], way, answer, alone[row], counts)


async def soak(server, rng, requests, seconds=None, bursts=None):
    """Loads a server for some seconds, or with so many bursts.

    Args:
        server: running.
        rng: draws requests, and what is asked when.
        requests: how many different ones.
        seconds: of load.
        bursts: of load, whatever time they take.

    Returns:
        What was counted: JSON values.
    """
    client, counts, memory = Client(server.url, server.model), Counter(), []
    asked = draw_filling(rng, FILLING, (PAGES - SPARE) // FILLING * PAGE)
    asked += draw_requests(rng, requests, LONGEST)
    alone = [await client.ask(each, Way()) for each in asked]
    end = None if seconds is None else time.monotonic() + seconds
    for done in itertools.count():
        if done == bursts or (end and time.monotonic() > end):
            break
        rows, ways = range(FILLING), [Way(stream=True)] * FILLING
        if done:
            rows = rng.integers(0, len(asked), rng.integers(1, BURST + 1))
            ways = [draw_way(rng, asked[row]) for row in rows]
        await burst(client, rows, ways, asked, alone, counts)
        memory.append(resident(server))
    metrics = await idle(client)
    await client.close()
    every = [round(memory[part * (len(memory) - 1) // 4]) for part in range(5)]
    return {
        "bursts": len(memory),
        **{name: counts[name] for name in NAMES},
        "preempted": int(metrics["vllm:num_preemptions_total"]),
        "found in the prefix cache": int(metrics["vllm:prefix_cache_hits_total"]),
        "pages in use at the end": metrics["vllm:kv_cache_usage_perc"],
        "MiB": every,
    }


async def idle(client):
    """Metrics once nothing is under way."""
    for _ in range(100):
        metrics = await client.metrics()
        if not metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]:
            break
        await asyncio.sleep(0.2)
    return metrics
