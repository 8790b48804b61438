"""Serves prompts with vLLM's CPU worker and either backend; prints log-probabilities as JSON.

Run as a program: `cuda_engine_run.py cpu|cuda`. The CUDA backend's kernels run under Triton's
interpreter, FlashAttention and the kernel that stores keys are replaced by plain ones.
"""

import json
import os
import random
import sys
from typing import Any

PROMPTS, SHARED, NEW_TOKENS, CHUNK = (167, 41), 130, 3, 96


def use_cuda_backend() -> None:
    """Puts the CUDA backend and what it needs of a GPU in the CPU's place."""
    from vllm.v1.attention.backends import flash_attn

    from dam_vllm.engine import checks, registration
    from tests.unit.attention.cuda.varlen_oracle import varlen

    asked = (
        "q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "block_table", "max_seqlen_q",
        "max_seqlen_k", "softmax_scale", "softcap", "causal",
    )  # fmt: skip

    def attend(**given: Any) -> None:
        varlen(**{name: given[name] for name in asked})

    def store(key: Any, value: Any, keys: Any, values: Any, slots: Any, *scales: Any) -> None:
        real = slots >= 0
        page, inside = slots[real] // keys.shape[1], slots[real] % keys.shape[1]
        keys[page, inside] = key[: len(slots)][real]
        values[page, inside] = value[: len(slots)][real]

    registration.BACKENDS["cpu"] = registration.BACKENDS["cuda"]
    checks._refuse_options = lambda options: None
    for name, stand_in in (
        ("get_flash_attn_version", lambda *args, **kwargs: 2),
        ("flash_attn_varlen_func", attend),
        ("reshape_and_cache_flash", store),
    ):
        setattr(flash_attn, name, stand_in)


def serve() -> list[list[float]]:
    """Log-probabilities of greedy tokens: a batch, then a prompt that shares a prefix with it."""
    from vllm import LLM, SamplingParams

    from dam_vllm.demo import model_dir

    dam = {"dense_below": 0, "kv_free": "layer"}
    if sys.argv[1] == "cuda":
        dam["kernel"] = "triton"
    llm = LLM(
        model=str(model_dir()), block_size=32, max_model_len=1024, max_num_batched_tokens=CHUNK,
        enforce_eager=True, kv_cache_memory_bytes=50_000_000, dtype="float32",
        attention_backend="dam", additional_config={"dam": dam},
    )  # fmt: skip
    draw = random.Random(7)
    prompts = [[1, *(draw.randrange(300, 2300) for _ in range(n - 1))] for n in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    found = []
    for batch in (prompts, [prompts[0][:SHARED] + prompts[1][1:20]]):
        tokens = [{"prompt_token_ids": prompt} for prompt in batch]
        for output in llm.generate(tokens, sampling, use_tqdm=False):
            steps = output.outputs[0].logprobs
            found.append([next(iter(step.values())).logprob for step in steps])
    return found


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if sys.argv[1] == "cuda":
        os.environ["TRITON_INTERPRET"] = "1"
        use_cuda_backend()
    print(json.dumps(serve()))
