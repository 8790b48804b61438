"""What is done with an engine whose scheduler and worker are at hand, and what is seen of it."""

from unittest.mock import patch

RESULT = "RESULT "
CANCELLED = "cancelled"


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
        self.most_poisoned = self.preempted = self.hits = self.guesses = 0
        self._poisoned = set()
        self._schedule = engine.scheduler.schedule
        engine.scheduler.schedule = self.schedule

    def schedule(self, *args, **kwargs):
        output = self._schedule(*args, **kwargs)
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


def sliding_window():
    """While it is entered: units that free pages get vLLM's own spec, which keeps no sinks."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec, replace_as

    from dam_vllm.engine.kv_free import apply

    def sliding(spec, cls, *, drop, bounds, in_flight_tokens):
        window = bounds.window * bounds.page + bounds.query_block
        return replace_as(spec, SlidingWindowSpec, drop=drop, sliding_window=window)

    return patch.object(apply, "replace_as", sliding)
