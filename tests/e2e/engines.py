"""Many vLLM engines, one after the other, in one process: `python -m tests.e2e.engines`.

Reads lines of JSON, `LLM`'s arguments and what to ask; prints a line RESULT and JSON for each, and
DONE at the end of what it logged. A server imports vLLM in each of its processes, which takes most
of the time until it answers; here that is done once.
"""

import gc
import json
import os
import sys
import traceback
from contextlib import nullcontext

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.interpreted_triton import assert_runner, stand_in

DONE = "DONE"
# vLLM collects again and again while an engine starts, which takes most of the time; here it is
# done once, when an engine is gone.
collect, gc.collect = gc.collect, lambda *generation: 0


def answer(setup):
    """Answers batches of prompts, one after the other, with a new engine: a dict of JSON values."""
    from vllm import LLM

    from tests.e2e.engine_run import sliding_window

    with sliding_window() if setup.get("sliding_window") else nullcontext():
        llm = LLM(**setup["arguments"])
    try:
        return ask_all(llm, setup)
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask_all(llm, setup):
    """Answers of an engine, and what became of its pages."""
    from tests.e2e.engine_run import Watch, ask, cancel
    from tests.e2e.features import in_other_ways, with_adapter

    engine = llm.llm_engine.engine_core.engine_core
    if setup["arguments"]["tensor_parallel_size"] == 1:
        assert_runner(engine)
    pool = engine.scheduler.kv_cache_manager.block_pool
    watch = Watch(engine, pool, poison=setup.get("poison", False))
    batches, new = setup["batches"], setup["new"]
    if setup.get("cancel"):
        cancel(llm, batches[0][0])
    if setup.get("adapter"):
        answers = with_adapter(llm, batches[0], new, setup["adapter"])
    elif setup.get("other_ways"):
        answers = in_other_ways(llm, batches[0], new)
    else:
        answers = {"answers": [ask(llm, batch, new) for batch in batches]}
    return answers | {
        "pages": pool.num_gpu_blocks - 1,
        "free": pool.get_num_free_blocks(),
        "poisoned": watch.most_poisoned,
        "preempted": watch.preempted,
        "hits": watch.hits,
        "guesses": watch.guesses,
    }


def clear():
    """Makes place for the next engine."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    collect()


def main():
    from dam_vllm.attention.cpu import llvm
    from tests.e2e.engine_run import RESULT

    stand_in()
    # Mends llvmlite before guessing tokens loads it, after which vLLM would start no other engine.
    llvm.compiles()
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            result = {"failed": str(error)}
        clear()
        print(f"\n{RESULT}{json.dumps(result)}", flush=True)
        sys.stderr.flush()
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
