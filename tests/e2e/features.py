"""What else an engine is asked, beside greedy answers; in the process of `tests.e2e.engines`."""

from tests.e2e.engine_run import ask

# A form that no answer here completes.
DIGITS, BEAMS, BEAM_TOKENS = r"[0-9]{99}", 2, 3


def with_adapter(llm, prompts, new, adapter):
    """Answers each prompt with an adapter and without, in one batch: a dict of JSON values.

    Args:
        llm: the engine, with LoRA.
        prompts: of tokens.
        new: tokens of an answer.
        adapter: its folder.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=1, ignore_eos=True)
    chosen = [LoRARequest("other", 1, adapter), None] * len(prompts)
    whole = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(2)]
    outputs = llm.generate(whole, sampling, lora_request=chosen, use_tqdm=False)
    answers = [told(output) for output in outputs]
    return {"adapter": answers[::2], "plain": answers[1::2]}


def in_other_ways(llm, prompts, new):
    """Answers prompts in a given form, scores them, searches by beams: a dict of JSON values.

    Args:
        llm: the engine.
        prompts: of tokens.
        new: tokens of an answer.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    whole = [{"prompt_token_ids": prompt} for prompt in prompts]
    digits = SamplingParams(
        temperature=0, max_tokens=new, logprobs=1,
        structured_outputs=StructuredOutputsParams(regex=DIGITS),
    )  # fmt: skip
    plain, structured = ask(llm, prompts, new), llm.generate(whole, digits, use_tqdm=False)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    beams = llm.beam_search(whole, BeamSearchParams(BEAMS, BEAM_TOKENS, ignore_eos=True))
    found = {
        "plain": plain,
        "structured": [told(output) for output in structured],
        "texts": [output.outputs[0].text for output in structured],
        "scored": [
            scores(output)
            for _ in range(2)
            for output in llm.generate(whole, scored, use_tqdm=False)
        ],
        "beams": [sorted(beam.cum_logprob for beam in output.sequences) for output in beams],
    }
    llm.sleep(level=2)
    llm.wake_up()
    return found | {"awake": ask(llm, prompts, new)}


def told(output):
    """An answer as `tests.e2e.engine_run.ask` tells it."""
    answer = output.outputs[0]
    logprobs = [
        {str(token): entry.logprob for token, entry in position.items()}
        for position in answer.logprobs
    ]
    return {"tokens": list(answer.token_ids), "logprobs": logprobs}


def scores(output):
    """Log-probabilities of a prompt's tokens, but for the first one."""
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return [entry[token].logprob for token, entry in pairs if entry is not None]
