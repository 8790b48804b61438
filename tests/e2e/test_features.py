"""Beside greedy answers: with all pages as stock vLLM, with sparse masks as the naive oracle."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from dam_vllm.demo import model_dir
from tests.e2e.conftest import Setup, arguments, chosen, environment
from tests.e2e.features import BEAM_TOKENS, BEAMS
from tests.e2e.test_equality import FP32_ROUNDING, assert_close

pytestmark = pytest.mark.e2e

# Of random tokens, as the prompts of `tests.e2e.conftest`, but few, since the oracle is asked.
LENGTHS, NEW, RANK = (401, 150), 6, 8
NAIVE = '{"dense_below": 0, "kernel": "naive"}'
# In chunks, and with prefixes that are found again.
ASKED = {"dtype": "float32", "chunk": 256, "prefix_caching": True}
SETUPS = {
    "stock": Setup(None, **ASKED),
    "every page": Setup("dense", **ASKED),
    "sparse": Setup("reuse", **ASKED),
    "oracle": Setup("reuse", NAIVE, **ASKED),
}
PAIRS = [("every page", "stock"), ("sparse", "oracle")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, seed):
    """A random LoRA adapter of the demo model's attention that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    rng, model = np.random.default_rng(seed), AutoConfig.from_pretrained(str(model_dir()))
    width, keys = model.hidden_size, model.num_key_value_heads * model.head_dim
    sizes = {"q_proj": model.num_attention_heads * model.head_dim, "k_proj": keys, "v_proj": keys}
    weights = {}
    for layer in range(model.num_hidden_layers):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (RANK, width)), ("B", (size, RANK))):
                drawn = rng.normal(0, 0.1, shape).astype(np.float32)
                weights[f"{at}.lora_{part}.weight"] = drawn
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [*sizes]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def found(mask_files, prompts, adapter, run_engine):
    """Function from a name of SETUPS to what its engines answered in every way."""
    short = [prompt[:length] for prompt, length in zip(prompts, LENGTHS, strict=False)]

    @functools.cache
    def ask(name):
        setup, whole = SETUPS[name], {}
        for lora in ({}, {"enable_lora": True, "max_lora_rank": RANK}):
            told = {
                "arguments": arguments(setup, mask_files) | lora,
                "batches": [short],
                "new": NEW,
            }
            # Stock vLLM on CPU fails where it scores prompts beside LoRA.
            told |= {"adapter": adapter} if lora else {"other_ways": True}
            answered, log = run_engine(told, environment(setup))
            assert "failed" not in answered, log[-6000:]
            whole = answered | whole
        return whole

    return ask


@pytest.mark.parametrize(("ours", "other"), PAIRS)
@pytest.mark.parametrize("kind", ["plain", "adapter", "structured", "awake"])
def test_answers(found, kind, ours, other):
    """With an adapter, of a given form, and after sleep, which CPUs ignore."""
    assert_alike(found(ours)[kind], found(other)[kind])


@pytest.mark.parametrize("name", SETUPS)
def test_every_way_is_another(found, name):
    """An adapter changes answers, sleep does not; forms are kept, prompts are scored anew."""
    told, count = found(name), len(LENGTHS)
    assert told["adapter"] != told["plain"]
    assert_alike(told["awake"], told["plain"])
    assert all(text.isdecimal() for text in told["texts"])
    assert told["scored"][:count] == told["scored"][count:]
    assert [len(each) for each in told["scored"][:count]] == [each - 1 for each in LENGTHS]
    assert all(len(each) == BEAMS for each in told["beams"])


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_log_probabilities_of_prompts(found, ours, other):
    for one, two in zip(found(ours)["scored"], found(other)["scored"], strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=FP32_ROUNDING)


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_beams(found, ours, other):
    """Sums of log-probabilities; which of two beams is kept may turn on rounding at a tie."""
    first, second = (found(name)["beams"] for name in (ours, other))
    np.testing.assert_allclose(first, second, rtol=0, atol=BEAM_TOKENS * FP32_ROUNDING)


def test_sparse_is_another(found):
    """What is compared does turn on the masks."""
    sparse, every = found("sparse"), found("every page")
    for kind in ("plain", "adapter", "structured"):
        with pytest.raises(AssertionError):
            assert_alike(sparse[kind], every[kind])
    for kind, most in (("scored", FP32_ROUNDING), ("beams", BEAM_TOKENS * FP32_ROUNDING)):
        pairs = zip(sparse[kind], every[kind], strict=True)
        assert max(np.abs(np.subtract(*pair)).max() for pair in pairs) > most


def assert_alike(first, second):
    """Answers equal within rounding."""
    assert_close(*([chosen(each) for each in told] for told in (first, second)), FP32_ROUNDING)
