"""The recipe's parts: what training sees, and what is wired in."""

from random import Random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dam_vllm.demo import model_dir
from dam_vllm.demo.training.circuits import OFFSETS, wire
from dam_vllm.demo.training.muon import orthogonalise
from dam_vllm.demo.training.network import Network
from dam_vllm.demo.training.samples import KINDS, REPLY, VALUE, Samples
from dam_vllm.demo.training.tokenizer import BOS

SOURCES = ["def add(a, b):\n    return a + b\n\n" * 400]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [128, 777])
def test_samples_have_their_length_and_begin_as_prompts_do(tokenizer, kind, tokens):
    sample = Samples(tokenizer, SOURCES, Random(1)).draw(kind, tokens)
    assert len(sample.ids) == len(sample.weights) == len(sample.positions) == tokens + 1
    assert sample.ids[0] == BOS
    assert sample.weights[0] == 0
    assert (np.diff(sample.positions) >= 1).all()


@pytest.mark.parametrize("kind", ["lines", "kv", "needle"])
def test_replies_are_tokenised_apart_from_the_prompt(tokenizer, kind):
    """A served prompt ends where the question does; training must have seen it end there."""
    samples = Samples(tokenizer, SOURCES, Random(2))
    for _ in range(20):
        sample = samples.draw(kind, 600)
        first = int(np.argmax((sample.weights == np.float32(REPLY)) | (sample.weights == VALUE)))
        prompt = tokenizer.decode(sample.ids[1:first].tolist(), skip_special_tokens=False)
        assert (
            tokenizer.encode(prompt, add_special_tokens=False).ids == sample.ids[1:first].tolist()
        )


def test_values_weigh_most(tokenizer):
    sample = Samples(tokenizer, SOURCES, Random(3)).draw("lines", 600)
    answers = tokenizer.decode(sample.ids[sample.weights == VALUE].tolist())
    assert answers.isdigit()


def attention(network, layer, ids, positions):
    """Attention weights [heads, tokens, tokens] of one layer, written out."""
    captured = {}

    def catch(query, key, value, **kwargs):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        captured.setdefault("weights", []).append(scores.masked_fill(~mask, -1e9).softmax(-1))
        return captured["weights"][-1] @ value

    original = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = catch
    try:
        with torch.no_grad():
            network(ids, positions)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    return captured["weights"][layer][0]


def test_first_layer_looks_back_by_fixed_offsets():
    network = Network()
    wire(network, seed=0)
    ids = torch.randint(6, 2000, (1, 120))
    weights = attention(network, 0, ids, torch.arange(120)[None])
    for head, offset in enumerate(OFFSETS):
        by_distance = torch.stack([weights[head].diagonal(-d)[20:].mean() for d in range(12)])
        assert int(by_distance.argmax()) == offset


def test_wiring_is_decided_by_the_seed():
    networks = [Network(), Network(), Network()]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        wire(network, seed)
    first, again, other = (network.layers[2].self_attn.q_proj.weight for network in networks)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(3, 40, 17), (2, 17, 40)])
def test_updates_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
    assert ((values > 0.5) & (values < 1.5)).all()
