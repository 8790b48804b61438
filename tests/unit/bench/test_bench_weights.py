"""Weights of models under measurement, as transformers reads them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dam_vllm.bench.model import DEMO, MODELS, write_model
from dam_vllm.bench.weights import write_weights
from dam_vllm.options import OptionError


def small(name):
    """A named shape's kind with few channels."""
    few = replace(MODELS[name], layers=3, hidden=192, intermediate=100, vocabulary=DEMO.vocabulary)
    return replace(few, heads=8, kv_heads=4, head_size=32)


@pytest.mark.parametrize("name", ["long", "llama-3.1-8b", "qwen3-4b", "qwen3-8b"])
def test_heads_attend_to_some_tokens_more_than_to_others(tmp_path, name):
    """No weight is missing, and the largest of a row is far from the mean, in all layers."""
    model = small(name)
    folder = write_model(tmp_path / "model", model, 512)
    write_weights(folder, model)
    assert sum(each.stat().st_size for each in folder.glob("*.safetensors")) > model.weight_bytes
    found, told = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(told.values()), told
    with torch.no_grad():
        attentions = found(torch.randint(300, 2300, (1, 301)), output_attentions=True).attentions
    for layer in attentions:
        assert layer[0, :, -1].amax(-1).mean() > 3 / 301
        assert len(layer[0, 0, -1].unique()) > 200


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(OptionError, match=r"need weights: 0\.\d GB in .*, 0\.0 GB are free"):
        write_weights(tmp_path, replace(small("long"), hidden=4096))
    assert not list(tmp_path.iterdir())
