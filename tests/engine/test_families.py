"""Families of models, small and random: calibrated, served, beside stock vLLM and the oracle."""

import functools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dam_vllm.calibration import capture
from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.candidates import Pattern
from dam_vllm.calibration.fit.inputs import FitInputs
from dam_vllm.calibration.fit.run import fit_modes
from dam_vllm.calibration.fit.store import FitStore
from dam_vllm.calibration.model import ModelSource
from dam_vllm.calibration.pipeline import Job, calibrate
from dam_vllm.calibration.progress import Reporter, Work
from dam_vllm.calibration.settings import CalibrationConfig, FitConfig
from dam_vllm.masks.baselines import dense, streaming
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.mask_set import HeadMode
from tests.conftest import fresh_seed, random_dynamic, random_tails
from tests.e2e.engine_run import RESULT
from tests.engine.families import HEAD_SIZE, REFUSED, SERVED, windowed, write
from tests.unit.calibration.conftest import texts_file  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU worker"),
]

ROOT = Path(__file__).parents[2]
LENGTHS = (333, 150)
ROUNDING, LEFT_OUT = 1e-4, 1e-3
FIT_KINDS = ("plain", "lines")
FIT = FitConfig(
    target_density=0.8, page=32, platform="cpu", lengths=[560], check=3, channels=[8, 32],
    query_blocks=1, choosing_cost=0.1,
)  # fmt: skip
ARGUMENTS = {
    "block_size": 32, "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4,
    "kv_cache_memory_bytes": 4_000_000, "dtype": "float32", "enforce_eager": True,
    "skip_tokenizer_init": True, "enable_prefix_caching": False,
}  # fmt: skip


class Source(ModelSource):
    """A model of `write`; some families have a tokenizer that words mean nothing to."""

    def __init__(self, folder):
        super().__init__(str(folder), None, torch.device("cpu"), "auto")

    def tokenizer(self):
        return PreTrainedTokenizerFast.from_pretrained(self.name)


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Function from a model, masks and options to answers, or to what was refused."""
    log = tmp_path_factory.mktemp("families") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.family_run"], cwd=ROOT, env=os.environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    draw = random.Random(fresh_seed())
    prompts = [[1, *(draw.randrange(3, 63) for _ in range(length - 1))] for length in LENGTHS]

    def ask(model, masks=None, load_format="auto", kinds=None, **options):
        arguments = ARGUMENTS | {"model": str(model), "load_format": load_format}
        if masks is not None:
            dam = {"masks": str(masks), "dense_below": 0, **options}
            arguments |= {"attention_backend": "dam", "additional_config": {"dam": dam}}
        if kinds is not None:
            arguments |= {"attention_config": {"backend_per_kind": kinds}}
            del arguments["attention_backend"]
        process.stdin.write(json.dumps({"arguments": arguments, "prompts": prompts}) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        raise AssertionError(log.read_text()[-6000:])

    yield ask
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory, texts_file):  # noqa: F811
    """Function from a family to a folder with a model and two mask files, some heads dynamic.

    "masks" are calibrated; with "every" all pages are read, or chosen.
    """

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp("model")
        write(SERVED[family](), folder)
        config = CalibrationConfig(pcl=40, tau=0.1, texts=8, window=48)
        masks = calibrate(
            Job(Source(folder), str(texts_file), "text", config, folder / "masks", 1.0)
        )
        save_mask_set(some_dynamic(masks), folder / "masks")
        every = some_dynamic(dense(str(folder)))
        every.dynamic.floors[:] = every.dynamic.caps[:] = ARGUMENTS["max_model_len"]
        save_mask_set(every, folder / "every")
        return folder

    return make


def some_dynamic(masks):
    """Lets every other KV head choose pages, by random bases and budgets."""
    rng = np.random.default_rng(fresh_seed())
    modes = masks.modes.copy()
    full = [layer for layer, kind in enumerate(masks.header.layer_types) if kind == "full"]
    chosen = [(layer, head) for layer in full for head in range(masks.kv_heads)][1::2]
    modes[tuple(np.transpose(chosen))] = HeadMode.DYNAMIC
    dynamic = random_dynamic(rng, *modes.shape, HEAD_SIZE)
    tails = random_tails(rng, modes) * np.isin(np.arange(len(modes)), full)[:, None]
    return replace(masks, modes=modes, dynamic=dynamic, tails=tails.astype(np.uint8))


def window(folder, tokens):
    """Masks that keep the latest tokens; all of one reach, as those of a fit are."""
    masks = streaming(str(folder), 1, 48)
    diagonals = masks.diagonals.copy()
    diagonals[..., tokens:] = False
    return replace(masks, diagonals=diagonals)


def fitted(folder):
    """A mask file whose heads' modes were fitted on random tokens."""
    capture.register()
    source = Source(folder)
    draw = np.random.default_rng(fresh_seed())
    lengths = (560, 540, 520)
    prompts = [(kind, draw.integers(3, 63, n).tolist()) for n in lengths for kind in FIT_KINDS]
    patterns = [Pattern(f"window {each}", partial(window, folder, each)) for each in (1, 48)]
    store = folder / "fit"
    store.mkdir()
    inputs = FitInputs(
        model=source.load(), shape=source.shape(), config=FIT, patterns=patterns,
        store=FitStore(store), work=Work(Reporter(), 1), memory=2**24,
    )  # fmt: skip
    save_mask_set(fit_modes(inputs, prompts), folder / "fitted")
    return folder / "fitted"


def distance(first, second):
    """Largest difference of the chosen tokens' log-probabilities; infinite for other tokens."""
    found = []
    for one, other in zip(first["answers"], second["answers"], strict=True):
        if one["tokens"] != other["tokens"]:
            return float("inf")
        steps = zip(one["tokens"], one["logprobs"], other["logprobs"], strict=True)
        found += [abs(here[str(token)] - there[str(token)]) for token, here, there in steps]
    return max(found)


@pytest.mark.parametrize("family", SERVED)
def test_a_family_is_calibrated_and_served(serve, model, family):
    folder = model(family)
    stock, every = serve(folder), serve(folder, folder / "every")
    assert distance(every, stock) < ROUNDING
    sparse = serve(folder, folder / "masks")
    oracle = serve(folder, folder / "masks", kernel="naive")
    assert distance(sparse, oracle) < ROUNDING
    assert distance(sparse, stock) > LEFT_OUT


def test_kinds_of_layers_may_be_left_to_vllm(serve, model):
    """The first layer has a sliding window; those with masks must be ours."""
    folder = model("Gemma 3")
    masks = folder / "masks"
    found = serve(folder, masks, kinds={"full_attention": "DAM"})
    assert distance(found, serve(folder, masks)) == 0
    refused = serve(folder, masks, kinds={"sliding_window": "DAM"})["refused"]
    assert "backend_per_kind leaves model.layers.1.self_attn.attn to CPUAttentionB" in refused
    assert "full_attention must be DAM" in refused


# Grouped queries, sliding windows with soft-capping, a KV head for each query head, and for all.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen 3", "Gemma 2", "GPT-NeoX", "GPTBigCode"])
def test_a_family_is_fitted_and_served(serve, model, family):
    folder = model(family)
    masks = fitted(folder)
    assert (load_mask_set(masks).modes == HeadMode.DYNAMIC).any()
    sparse, oracle = serve(folder, masks), serve(folder, masks, kernel="naive")
    assert distance(sparse, oracle) < ROUNDING


@pytest.mark.parametrize("kind", REFUSED)
def test_other_attention_is_refused_by_name(serve, tmp_path, kind):
    REFUSED[kind]().save_pretrained(tmp_path)
    if kind != "no attention layers":  # of which there are no masks
        save_mask_set(streaming(str(tmp_path), 1, 32), tmp_path / "masks")
    found = serve(tmp_path, tmp_path / "masks", load_format="dummy")
    assert f"has {kind}, which DAM does not serve" in found["refused"]


def test_windows_are_left_to_vllm(serve, tmp_path):
    """A Mistral all of whose layers have a window: nothing to calibrate, nothing to change."""
    write(windowed(), tmp_path)
    with pytest.raises(CalibrationError, match="no full-attention layer: its layers are sliding"):
        Source(tmp_path).shape()
    save_mask_set(streaming(str(tmp_path), 1, 32), tmp_path / "masks")
    assert serve(tmp_path, tmp_path / "masks") == serve(tmp_path)
