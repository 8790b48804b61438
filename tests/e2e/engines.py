"""Many vLLM engines, one after the other, in one process: `python -m tests.e2e.engines`.

Reads lines of JSON, `LLM`'s arguments and what to ask; prints a line RESULT and JSON for each, and
DONE at the end of what it logged. A server imports vLLM in each of its processes, which takes most
of the time until it answers; here that is done once.
"""

import gc
import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.interpreted_triton import assert_runner, stand_in

DONE = "DONE"
# vLLM collects again and again while an engine starts, which takes most of the time; here it is
# done once, when an engine is gone.
collect, gc.collect = gc.collect, lambda *generation: 0


def answer(setup):
    """Answers all prompts alone, then all at once, with a new engine: a dict of JSON values."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.e2e.engine_run import Watch, ask
    from tests.e2e.features import in_other_ways, with_adapter

    llm = LLM(**setup["arguments"])
    engine = llm.llm_engine.engine_core.engine_core
    if setup["arguments"]["tensor_parallel_size"] == 1:
        assert_runner(engine)
    watch = Watch(engine, engine.scheduler.kv_cache_manager.block_pool, poison=False)
    prompts, new = setup["prompts"], setup["new"]
    if setup.get("adapter"):
        answers = with_adapter(llm, prompts, new, setup["adapter"])
    elif setup.get("other_ways"):
        answers = in_other_ways(llm, prompts, new)
    else:
        answers = {"alone": [ask(llm, [prompt], new)[0] for prompt in prompts]}
        answers["together"] = ask(llm, prompts, new)
    llm.llm_engine.engine_core.shutdown()
    del llm, engine
    cleanup_dist_env_and_memory()
    collect()
    return answers | {
        "preempted": watch.preempted,
        "hits": watch.hits,
        "guesses": watch.guesses,
    }


def main():
    from dam_vllm.attention.cpu import llvm
    from tests.e2e.engine_run import RESULT

    stand_in()
    # Mends llvmlite before guessing tokens loads it, after which vLLM would start no other engine.
    llvm.compiles()
    for line in sys.stdin:
        print(f"\n{RESULT}{json.dumps(answer(json.loads(line)))}", flush=True)
        sys.stderr.flush()
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
