"""Requests over the OpenAI-compatible API, with the time at which each token arrives."""

import json
import random
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median

FIRST_ID = 16  # the ids before are the tokenizer's special tokens


def random_prompt(tokens: int, vocabulary: int) -> list[int]:
    """Token ids that no earlier request shares a prefix with."""
    return random.choices(range(FIRST_ID, vocabulary), k=tokens)


def arrivals(url: str, model: str, prompt: Sequence[int], tokens: int) -> list[float]:
    """Asks for a completion as a stream.

    Args:
        url: base of the API, ending in "/v1".
        model: name that the server knows its model by.
        prompt: token ids.
        tokens: tokens to generate; the end of text is ignored.

    Returns:
        When each token came, in seconds of `time.perf_counter`, after the time of sending.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    times = [time.perf_counter()]
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    return times


def together(
    url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int
) -> list[list[float]]:
    """Sends requests at the same time; returns the arrivals of each."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [pool.submit(arrivals, url, model, prompt, tokens) for prompt in prompts]
        return [job.result() for job in jobs]


def decode_step(times: Sequence[Sequence[float]]) -> float:
    """Median time of a decode step in which all requests took part.

    Args:
        times: arrivals of requests that were served together, first the time of sending.

    Returns:
        Seconds: gaps between tokens after the last prompt was read and before the first
        request ended.

    Raises:
        ValueError: if the requests never decoded together.
    """
    start = max(request[1] for request in times)
    end = min(request[-1] for request in times)
    gaps = [b - a for request in times for a, b in pairwise(request[1:]) if start <= a and b <= end]
    if not gaps:
        raise ValueError("the requests never decoded together; generate more tokens")
    return median(gaps)
