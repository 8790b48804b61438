"""Engines of small models, one after the other in one process: `python -m tests.engine.family_run`.

Reads lines of JSON, `LLM`'s arguments and prompts; prints RESULT and JSON for each: answers with
log-probabilities, or what was refused.
"""

import gc
import json
import os
import sys
import traceback

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

NEW = 3


def answer(arguments, prompts):
    """Answers all prompts at once, with a new engine."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.e2e.engine_run import ask

    llm = None
    try:
        llm = LLM(**arguments)
        return {"answers": ask(llm, prompts, NEW)}
    except ValueError as error:
        traceback.print_exc()
        return {"refused": str(error)}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def start_cheaply():
    """Saves most of what an engine costs where its model costs nothing."""
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    # `LLM` takes kinds of layers (`backend_per_kind`) before it loads plugins, the command after.
    load_general_plugins()
    # vLLM looks at each model's class in a process of its own.
    registry._LazyRegisteredModel.inspect_model_cls = lambda lazy: (
        registry._ModelInfo.from_model_cls(lazy.load_model_cls())
    )
    # Small engines leave little, and a collection goes through all that vLLM has imported.
    gc.collect = lambda *generation: 0


def main():
    from tests.e2e.engine_run import RESULT

    start_cheaply()
    for line in sys.stdin:
        print(f"\n{RESULT}{json.dumps(answer(**json.loads(line)))}", flush=True)


if __name__ == "__main__":
    main()
