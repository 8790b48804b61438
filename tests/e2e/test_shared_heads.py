"""More tensor-parallel ranks than KV heads: vLLM gives every rank a copy of one."""

import random
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.mask_set import HeadMode
from tests.conftest import random_dynamic
from tests.e2e.conftest import PAGE, Setup, chosen, environment
from tests.e2e.test_equality import FP32_ROUNDING, assert_close
from tests.engine.families import HEAD, HEAD_SIZE, write
from tests.unit.calibration.conftest import save_tokenizer

pytestmark = pytest.mark.e2e

# Static pages of every layer hold the latest tokens: shorter requests read everything.
WINDOW, SHORT, LONG, NEW = 160, 150, 460, 6
MODES = [HeadMode.STATIC, HeadMode.DYNAMIC, HeadMode.REUSE, HeadMode.DENSE]
MODEL = HEAD | {"num_hidden_layers": len(MODES)}
ARGUMENTS = {
    "block_size": PAGE, "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4,
    "kv_cache_memory_bytes": 4_000_000, "dtype": "float32", "enforce_eager": True,
    "skip_tokenizer_init": True, "enable_prefix_caching": False,
}  # fmt: skip


@pytest.fixture
def models(tmp_path, seed):
    """Folders of one model and its masks: with one KV head, and with it twice."""
    one, two = tmp_path / "one", tmp_path / "two"
    write(LlamaConfig(**MODEL | {"num_key_value_heads": 1}), one)
    weights = AutoModelForCausalLM.from_pretrained(one).state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.repeat(2, 1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL | {"num_key_value_heads": 2}))
    model.load_state_dict(weights)
    model.save_pretrained(two)
    save_tokenizer(two)
    for copies, folder in enumerate((one, two), start=1):
        save_mask_set(masks_of(folder, copies, seed), folder / "masks")
    return one, two


def masks_of(folder, copies, seed):
    """Masks of a mode a layer, alike for all copies of the KV head."""
    rng, layers = np.random.default_rng(seed), len(MODES)
    modes = np.array(MODES, np.uint8)[:, None].repeat(copies, axis=1)
    one = vars(random_dynamic(rng, layers, 1, HEAD_SIZE)).values()
    dynamic = Dynamic(*(array.repeat(copies, axis=1) for array in one))
    dynamic.floors[:], dynamic.caps[:] = PAGE, 3 * PAGE
    anchors = np.full((layers, copies, 2), -1, np.int32)
    anchors[2] = [(1, head) for head in range(copies)]
    masks = streaming(str(folder), 1, WINDOW)
    return replace(masks, modes=modes, dynamic=dynamic, anchors=anchors)


def test_two_ranks_share_a_kv_head(models, seed, run_engine):
    """Each chooses for its own query heads, as a copy of the KV head in one rank does."""
    draw = random.Random(seed)
    prompts = [[1, *(draw.randrange(3, 63) for _ in range(n - 1))] for n in (SHORT, LONG)]

    def ask(model, ranks=1, masks=True, **options):
        given = ARGUMENTS | {"model": str(model), "tensor_parallel_size": ranks}
        if masks:
            dam = {"masks": str(model / "masks"), "dense_below": 0, **options}
            given |= {"attention_backend": "dam", "additional_config": {"dam": dam}}
        variables = environment(Setup(dtype="float32", tensor_parallel=ranks))
        batches = [[prompt] for prompt in prompts]
        asked = {"arguments": given, "batches": batches, "new": NEW}
        told, log = run_engine(asked, variables)
        assert "failed" not in told, log[-6000:]
        return [chosen(answer) for (answer,) in told["answers"]]

    one, two = models
    ours, stock = ask(one, ranks=2), ask(one, masks=False)
    oracle = ask(two, kernel="naive")
    assert_close(ours[:1], stock[:1], FP32_ROUNDING)
    assert_close(ours[1:], oracle[1:], FP32_ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(ours[1:], stock[1:], FP32_ROUNDING)
