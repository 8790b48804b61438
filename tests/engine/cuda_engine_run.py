"""Serves prompts with vLLM's CPU worker and either backend; prints log-probabilities as JSON.

Run as a program: `cuda_engine_run.py cpu|cuda KV_FREE ...`, an engine for each. The CUDA backend's
kernels run under Triton's interpreter, FlashAttention and the kernel that stores keys are replaced
by plain ones. Where pages of single heads are freed, or none to compare with, masks reach less far
than the prompt, and pages that nobody holds are filled with NaN.
"""

import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
from typing import Any

import numpy as np

from tests.conftest import interpreted, random_mask_set
from tests.interpreted_triton import assert_runner, stand_in

PROMPTS, SHARED, NEW_TOKENS, CHUNK = (167, 41), 130, 3, 96
LONGER = (340, 41)


def use_cuda_backend() -> None:
    """Puts the CUDA backend and what it needs of a GPU in the CPU's place."""
    from vllm.v1.attention.backends import flash_attn

    from dam_vllm.attention.cuda import choosing, scratch  # noqa: F401
    from dam_vllm.engine import checks, registration
    from tests.unit.attention.cuda.varlen_oracle import varlen

    interpreted(setattr)

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
    for name, plain in (
        ("get_flash_attn_version", lambda *args, **kwargs: 2),
        ("flash_attn_varlen_func", attend),
        ("reshape_and_cache_flash", store),
    ):
        setattr(flash_attn, name, plain)


def short_masks() -> str:
    """A mask file for the demo model with heads of all modes, that reach 64 tokens."""
    from dam_vllm.demo import model_dir
    from dam_vllm.masks.file import save_mask_set
    from dam_vllm.masks.fingerprint import fingerprint
    from dam_vllm.masks.mask_set import HeadMode

    made = random_mask_set(
        np.random.default_rng(11), 4, 8, 4, pcl=64, share=0.002, dynamic=True, head_size=32,
        fingerprint=fingerprint(str(model_dir())),
    )  # fmt: skip
    made.modes[:] = HeadMode.STATIC
    # No layer can be freed whole.
    made.modes[range(4), [3, 0, 2, 1]] = [HeadMode.DENSE, *[HeadMode.DYNAMIC] * 3]
    tails = np.zeros((4, 4), np.uint8)
    tails[0, :2] = tails[1, 0] = tails[3, 1] = 1  # of two dynamic heads and of static ones
    # So little that spans stay unread.
    made.dynamic.floors[:], made.dynamic.caps[:] = 32, 32
    made = dataclasses.replace(made, tails=tails)
    file = tempfile.mkdtemp() + "/masks.safetensors"
    save_mask_set(made, file)
    return file


def serve(kv_free: str) -> dict[str, Any]:
    """Log-probabilities of greedy tokens: a batch, then a prompt that shares a prefix with it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from dam_vllm.demo import model_dir
    from tests.e2e.engine_run import Watch

    dam = {"dense_below": 0, "kv_free": kv_free}
    if kv_free != "layer":
        dam["masks"] = short_masks()
    if sys.argv[1] == "cuda":
        dam["kernel"] = "triton"
    llm = LLM(
        model=str(model_dir()), block_size=32, max_model_len=1024, max_num_batched_tokens=CHUNK,
        enforce_eager=True, kv_cache_memory_bytes=50_000_000, dtype="float32",
        attention_backend="dam", additional_config={"dam": dam},
    )  # fmt: skip
    engine = llm.llm_engine.engine_core.engine_core
    assert_runner(engine)
    watch = Watch(engine, engine.scheduler.kv_cache_manager.block_pool, poison=kv_free != "layer")
    draw = random.Random(7)
    lengths = PROMPTS if kv_free == "layer" else LONGER
    prompts = [[1, *(draw.randrange(300, 2300) for _ in range(n - 1))] for n in lengths]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    found = []
    for batch in (prompts, [prompts[0][:SHARED] + prompts[1][1:20]]):
        tokens = [{"prompt_token_ids": prompt} for prompt in batch]
        for output in llm.generate(tokens, sampling, use_tqdm=False):
            steps = output.outputs[0].logprobs
            found.append([next(iter(step.values())).logprob for step in steps])
    layers = len(llm.llm_engine.vllm_config.compilation_config.static_forward_context)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return {"found": found, "poisoned": watch.most_poisoned, "layers": layers}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if sys.argv[1] == "cuda":
        os.environ["TRITON_INTERPRET"] = "1"
        stand_in()
        use_cuda_backend()
    stand_in()
    # It goes through all that vLLM has imported, again and again while an engine starts.
    gc.collect = lambda *generation: 0
    print(json.dumps([serve(kv_free) for kv_free in sys.argv[2:]]))
