"""One vLLM engine whose pool of pages is watched; run with `python -m` and a JSON argument.

Scheduler and worker run in this process, so that the pool can be seen at every step. The result
is the line that starts with RESULT.
"""

import json
import os
import sys
import time
from typing import Any

RESULT = "RESULT "
MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


def measure(setup: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine and looks at its pool.

    Args:
        setup: "arguments" of `vllm.LLM`; "prompt", tokens of a request that is watched, 0 for
            none; "requests", "tokens" and "new", a number of requests, the tokens of each prompt
            and of each answer, that are timed.

    Returns:
        "capacity", requests of the model's length that fit by vLLM's own count; "held", after
        each step of the watched request, its tokens and the bytes of pages in use; "seconds" for
        the timed requests, and how many tokens "generated".
    """
    from vllm import LLM

    llm = LLM(**setup["arguments"])
    cache = llm.llm_engine.vllm_config.cache_config
    result: dict[str, Any] = {"capacity": cache.kv_cache_max_concurrency}
    if setup["prompt"]:
        result["held"] = _held(llm, setup["prompt"], setup["arguments"]["kv_cache_memory_bytes"])
    if setup["requests"]:
        _answer(llm, 1, 64, 4)
        start = time.perf_counter()
        _answer(llm, setup["requests"], setup["tokens"], setup["new"])
        result["seconds"] = time.perf_counter() - start
    return result


def _held(llm: Any, prompt: int, cache_bytes: int) -> list[list[int]]:
    """Tokens of one request and the bytes of pages that it holds, step by step."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    held: list[list[int]] = []
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        tokens = sum(request.num_computed_tokens for request in scheduler.running)
        held.append([tokens, used * (cache_bytes // pool.num_gpu_blocks)])
        return output

    scheduler.schedule = watched
    _answer(llm, 1, prompt, 4)
    scheduler.schedule = schedule
    return [point for point in held if point[0]]


def _answer(llm: Any, requests: int, tokens: int, new: int) -> None:
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": [(31 * row + 7 * at) % (vocabulary - 1) for at in range(tokens)]}
        for row in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    llm.generate(prompts, sampling, use_tqdm=False)


if __name__ == "__main__":
    os.environ[MULTIPROCESSING] = "0"
    print(f"\n{RESULT}{json.dumps(measure(json.loads(sys.argv[1])))}", flush=True)
