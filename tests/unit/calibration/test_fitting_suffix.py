"""Passes that begin at a layer, against whole ones."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen3MoeConfig

from dam_vllm.calibration.capture import register
from dam_vllm.calibration.fit.simulate import full_attention
from dam_vllm.calibration.fit.states import hooked, prepare, run
from dam_vllm.calibration.fit.suffix import Suffix, decoder_layers
from dam_vllm.masks.model_shape import model_shape
from tests.unit.calibration.conftest import CONFIGS, SMALL

FURTHER = {
    # As many experts as layers.
    "experts": lambda: Qwen3MoeConfig(
        **SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "other names": lambda: GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256,
    ),
}  # fmt: skip
ROWS = [5, 60]


@pytest.fixture(params=["gqa", "sliding", "gemma", *FURTHER])
def model(request):
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((CONFIGS | FURTHER)[request.param]())
    prepare(model.eval())
    return model


class Shifted:
    """Hook that changes a layer's attention, and tells which layers computed any."""

    def __init__(self, layer, begin=0):
        self.layer, self.begin, self.seen = layer, begin, []

    def __call__(self, states):
        self.seen.append(states.layer)
        if states.layer != self.layer:
            return None
        rows = torch.arange(states.first, states.key.shape[1])
        full = torch.cat([full_attention(states, head, rows) for head in range(len(states.key))])
        full[:, rows >= self.begin] *= 0.5
        return full


def test_they_are_the_whole_ones(rng, model):
    ids = rng.integers(3, 64, 61).tolist()
    count = model.config.num_hidden_layers
    suffix = Suffix(model, ids, ROWS)
    for layer in (0, 1, count - 1):
        whole, part = Shifted(layer), Shifted(layer)
        with hooked(whole):
            expected = run(model, ids, ROWS)
        suffix.skip(layer)
        with hooked(part):
            found = suffix.logits()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert whole.seen == list(range(count))
        assert part.seen == list(range(layer, count))
        assert not torch.equal(found, run(model, ids, ROWS))


def test_they_begin_at_a_row(rng, model):
    """What is before, is as under full attention."""
    ids, first = rng.integers(3, 64, 61).tolist(), 48
    kinds = model_shape(model.config).layer_types
    suffix = Suffix(model, ids, [50, 60], first)
    for layer in (row for row, kind in enumerate(kinds) if kind == "full"):
        with hooked(Shifted(layer, first)):
            expected = run(model, ids, [50, 60])
        suffix.skip(layer)
        # Nothing is kept of a pass.
        for _ in range(2):
            with hooked(Shifted(layer)):
                found = suffix.logits()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - run(model, ids, [50, 60])).abs().max() > 1e-3


def test_what_is_done_is_not_computed_again(rng, model):
    suffix = Suffix(model, rng.integers(3, 64, 30).tolist(), [29])
    for layer, expected in ((2, [0, 1]), (2, []), (1, [])):
        seen = Shifted(None)
        with hooked(seen):
            suffix.skip(layer)
        assert seen.seen == expected


def test_layers_that_are_not_found_are_always_computed(rng, model, monkeypatch):
    monkeypatch.setattr("dam_vllm.calibration.fit.suffix._index", lambda layer: None)
    assert decoder_layers(model) == []
    ids = rng.integers(3, 64, 61).tolist()
    suffix = Suffix(model, ids, ROWS)
    suffix.skip(2)
    torch.testing.assert_close(suffix.logits(), run(model, ids, ROWS), rtol=0, atol=0)
