"""One vLLM engine in a process of its own, scheduler and worker at hand: `python -m ... JSON`.

Prints one line, RESULT and JSON: answers, and what became of the pool's pages.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.interpreted_triton import assert_runner, stand_in

PAGE = 32
RESULT = "RESULT "
CANCELLED = "cancelled"


def main(setup):
    """Answers each prompt alone or all at once, as `setup` (a dict) says."""
    stand_in()
    from vllm import LLM

    if setup.get("sliding_window"):
        use_sliding_window()
    if setup.get("ranks"):
        cores = sorted(os.sched_getaffinity(0))
        ranks = (str(cores[rank % len(cores)]) for rank in range(setup["ranks"]))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
    llm = LLM(**arguments(setup))
    engine = llm.llm_engine.engine_core.engine_core
    if not setup.get("ranks"):
        assert_runner(engine)
    pool = engine.scheduler.kv_cache_manager.block_pool
    watch = Watch(engine, pool, poison=setup.get("poison", False))
    if setup.get("cancel"):
        cancel(llm, setup["prompts"][0])
    batches = [setup["prompts"]] * setup.get("rounds", 1)
    if setup.get("alone"):
        batches = [[prompt] for prompt in setup["prompts"]]
    answers = [answer for batch in batches for answer in ask(llm, batch, setup["new"])]
    result = {
        "answers": answers,
        "pages": pool.num_gpu_blocks - 1,
        "free": pool.get_num_free_blocks(),
        "peak": watch.peak,
        "poisoned": watch.most_poisoned,
        "preempted": watch.preempted,
        "hits": watch.hits,
    }
    print(f"\n{RESULT}{json.dumps(result)}", flush=True)


def arguments(setup):
    """Keyword arguments of `LLM`."""
    from dam_vllm.demo import model_dir

    length = setup["max_len"]
    return {
        "model": str(model_dir()),
        "dtype": setup.get("dtype", "float32"),
        "kv_cache_dtype": setup.get("cache_dtype", "auto"),
        "tensor_parallel_size": setup.get("ranks", 1),
        "attention_backend": "dam",
        "block_size": PAGE,
        "max_model_len": length,
        "hf_overrides": {"max_position_embeddings": length},
        "max_num_seqs": 8,
        "max_num_batched_tokens": setup["chunk"],
        "kv_cache_memory_bytes": setup["cache_bytes"],
        "enable_prefix_caching": setup.get("prefix_caching", False),
        "enforce_eager": True,
        "max_logprobs": 5,
        "additional_config": {"dam": {"masks": setup["masks"], **setup["options"]}},
    }


def ask(llm, prompts, new):
    """Greedy answers: token ids, and the five best log-probabilities at each."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=5, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): entry.logprob for token, entry in position.items()}
                for position in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]


def cancel(llm, prompt):
    """Starts a request and cancels it in the middle of its prefill."""
    from vllm import SamplingParams

    llm.llm_engine.add_request(
        CANCELLED, {"prompt_token_ids": prompt}, SamplingParams(max_tokens=4)
    )
    for _ in range(3):
        llm.llm_engine.step()
    llm.llm_engine.abort_request([CANCELLED])


class Watch:
    """Looks at the pool after each scheduling, and fills pages of nobody with NaN.

    A page that is handed out again is cleared: vLLM's kernels multiply what lies behind a
    request's end by zero.
    """

    def __init__(self, engine, pool, poison):
        self.pool, self.engine, self.poison = pool, engine, poison
        self.peak = self.most_poisoned = self.preempted = self.hits = self.guesses = 0
        self._poisoned = set()
        self._schedule = engine.scheduler.schedule
        engine.scheduler.schedule = self.schedule

    def schedule(self, *args, **kwargs):
        output = self._schedule(*args, **kwargs)
        self.peak = max(self.peak, self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())
        self.preempted += len(output.preempted_req_ids or ())
        self.hits += sum(request.num_computed_tokens for request in output.scheduled_new_reqs)
        self.guesses += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        if self.poison:
            self._fill()
        return output

    def _fill(self):
        nobodys = {
            block.block_id
            for block in self.pool.blocks
            if block.ref_cnt == 0 and block.block_hash is None and not block.is_null
        }
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        layers = runner.compilation_config.static_forward_context.values()
        for pages, value in ((self._poisoned - nobodys, 0.0), (nobodys - self._poisoned, None)):
            for layer in layers if pages else ():
                cache, rows = layer.kv_cache, sorted(pages)
                not_a_number = 0x7F if cache.element_size() == 1 else float("nan")
                cache[rows] = not_a_number if value is None else value
        self._poisoned = nobodys
        self.most_poisoned = max(self.most_poisoned, len(nobodys))


def use_sliding_window():
    """Gives units that free pages vLLM's own sliding-window spec, which keeps no sinks."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec, replace_as

    from dam_vllm.engine.kv_free import apply

    def sliding(spec, cls, *, drop, bounds, in_flight_tokens):
        window = bounds.window * bounds.page + bounds.query_block
        return replace_as(spec, SlidingWindowSpec, drop=drop, sliding_window=window)

    apply.replace_as = sliding


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
