"""Parts of the fit against plain definitions: attention by page, served masks, bases, states."""

import dataclasses

import numpy as np
import pytest
import torch

from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.calibration.capture import register
from dam_vllm.calibration.fit.rows import split_rows
from dam_vllm.calibration.fit.samples import REPLY_TOKENS, question_prompts, with_reply
from dam_vllm.calibration.fit.simulate import Simulation
from dam_vllm.calibration.fit.states import KeyCovariance, LayerStates, hooked, prepare, run
from dam_vllm.masks.mask_set import HeadMode
from tests.oracle import dynamic_mask
from tests.unit.calibration.conftest import build

PAGE = 16
SCALE = 0.4


def random_states(rng, tokens, heads=4, kv_heads=2, size=24, softcap=0.0, layer=0):
    torch.manual_seed(int(rng.integers(2**31)))
    return LayerStates(
        layer,
        torch.randn(heads, tokens, size) * 3,
        torch.randn(kv_heads, tokens, size),
        torch.randn(kv_heads, tokens, size),
        SCALE,
        softcap,
    )


def expected_output(states, mask, tails=()):
    """Naive attention under bool [heads, queries, keys]: [heads, tokens, size]."""
    each = (part.transpose(0, 1) for part in (states.query, states.key, states.value))
    found = masked_attention(*each, mask, states.scale, states.softcap, tails, PAGE)
    return found.transpose(0, 1)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_pages_add_up_to_attention_under_any_selection(rng, softcap):
    tokens = 395
    states = random_states(rng, tokens, softcap=softcap)
    position = torch.tensor([[17, 18, 19], [388, 389, 390]])
    head, heads_per_kv = 1, states.heads_per_kv
    rows = split_rows(states, head, position, PAGE)
    pages = rows.mass.shape[1]
    # Some read so little that whole spans are left.
    share = np.array([0.4, 0.4, 0.4, 0.05, 0.05, 0.05])[:, None, None]
    selected = torch.from_numpy(rng.random((6, len(position), pages)) < share)
    selected[5, 1, 8:16] = False
    selected[:, torch.arange(2), position[:, 0] // PAGE] = True
    selected[0] = True
    heads = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    full = expected_output(states, causal.expand(4, -1, -1))
    for each, query_blocks in enumerate(selected):
        for tail in range(2):
            error = 0.0
            for query_block, chosen in enumerate(query_blocks):
                keys = chosen.repeat_interleave(PAGE)[:tokens]
                keys = torch.nn.functional.pad(keys, (0, tokens - len(keys)))
                mask = (causal & keys).expand(4, -1, -1)
                other = expected_output(states, mask, [head] * tail)
                lost = (other - full)[heads, position[query_block]]
                error += float(lost.double().square().sum())
            assert float(rows.errors(selected)[tail, each]) == pytest.approx(error, 1e-3, 1e-6)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_simulation_of_the_last_queries_is_that_of_all(rng, random_masks, softcap):
    masks = random_masks(dynamic=True, reuse=True, dense=True, layers=2)
    prompt, tokens, first = 131, 150, 128
    whole, end = Simulation(masks, PAGE, prompt), Simulation(masks, PAGE, prompt, (first, tokens))
    for layer in range(masks.layers):
        states = random_states(rng, tokens, softcap=softcap, layer=layer)
        last = dataclasses.replace(states, query=states.query[:, first:])
        torch.testing.assert_close(end(last), whole(states)[:, first:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "prompt"), [(350, 331), (96, 96), (361, 328)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_simulation_is_attention_over_the_served_pages(
    rng, random_masks, monkeypatch, tokens, prompt, softcap
):
    monkeypatch.setattr("dam_vllm.calibration.fit.simulate.ROWS", 50)
    masks = random_masks(dynamic=True, dense=True, tails=True, layers=2)
    heads_per_kv = masks.heads // masks.kv_heads
    for layer in range(masks.layers):
        states = random_states(rng, tokens, softcap=softcap, layer=layer)
        found = Simulation(masks, PAGE, prompt)(states)
        mask = page_mask(masks, layer, 0, tokens, PAGE)
        for head in np.flatnonzero(masks.modes[layer] == HeadMode.DYNAMIC):
            mask[head * heads_per_kv : (head + 1) * heads_per_kv] = served(
                masks, states, head, prompt
            )
        tails = masks.tails[layer].nonzero()[0]
        expected = expected_output(states, torch.from_numpy(mask), tails)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        full = expected_output(states, torch.ones_like(torch.from_numpy(mask)).tril())
        some = Simulation(masks, PAGE, prompt, (17, tokens - 3))(states)
        expected[:, :17], expected[:, tokens - 3 :] = full[:, :17], full[:, tokens - 3 :]
        torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-4)


def test_the_last_layer_computes_the_rows_that_are_compared(rng, random_masks):
    masks, rows = random_masks(dynamic=True, layers=2), [3, 40, 140, 149]
    for layer in range(2):
        states = random_states(rng, 150, layer=layer)
        whole = Simulation(masks, PAGE, 131)(states)
        found = Simulation(masks, PAGE, 131, compared=rows)(states)
        torch.testing.assert_close(found[:, rows], whole[:, rows], rtol=1e-5, atol=1e-5)
        other = [row for row in range(150) if row not in rows]
        if layer == 0:
            torch.testing.assert_close(found[:, other], whole[:, other], rtol=1e-5, atol=1e-5)
        else:
            assert not found[:, other].any()


def test_simulation_keeps_what_anchors_chose(rng, random_masks):
    """Heads of the anchor's layer, before and after it, and of a later one read its pages."""
    tokens, prompt = 150, 131
    masks = random_masks(dynamic=True, layers=3, kv_heads=4, heads=8)
    masks.modes[:, 3] = HeadMode.STATIC
    masks.modes[0] = [HeadMode.REUSE, HeadMode.DYNAMIC, HeadMode.REUSE, HeadMode.STATIC]
    masks.modes[2, 0] = HeadMode.REUSE
    anchors = np.full((3, 4, 2), -1, dtype=np.int32)
    anchors[0, [0, 2]] = anchors[2, 0] = 0, 1
    masks = dataclasses.replace(masks, anchors=anchors)
    simulation = Simulation(masks, PAGE, prompt)
    for layer in range(3):
        states = random_states(rng, tokens, heads=8, kv_heads=4, layer=layer)
        static = page_mask(masks, layer, 0, tokens, PAGE, query_block=PAGE)
        mask = page_mask(masks, layer, 0, tokens, PAGE)
        if layer == 0:
            chosen = served(masks, states, 1, prompt) & ~static[2:4]
        for head, mode in enumerate(masks.modes[layer]):
            heads = slice(2 * head, 2 * head + 2)
            if mode == HeadMode.DYNAMIC:
                mask[heads] = served(masks, states, head, prompt)
            if mode == HeadMode.REUSE:
                mask[heads] = static[heads] | chosen[:1]
        expected = expected_output(states, torch.from_numpy(mask))
        torch.testing.assert_close(simulation(states), expected, rtol=1e-4, atol=1e-4)


def served(masks, states, head, prompt):
    """A dynamic head's mask: the prompt in one go, later tokens one by one."""
    rotation = torch.from_numpy(masks.dynamic.rotations[states.layer, head])
    heads = slice(head * states.heads_per_kv, (head + 1) * states.heads_per_kv)
    query = (states.query[heads] @ rotation).transpose(0, 1)
    key = states.key[head] @ rotation
    tokens = len(key)
    result = np.zeros((tokens, tokens), dtype=bool)
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens))]:
        static = page_mask(masks, states.layer, start, stop, PAGE, query_block=PAGE)[heads.start]
        result[start:stop, :stop] = dynamic_mask(
            masks, states.layer, head, query[start:stop], key[:stop], static, PAGE,
            states.scale, states.softcap,
        )  # fmt: skip
    return result


def test_bases_are_orthogonal_and_ordered_by_variance(rng):
    covariance = KeyCovariance()
    keys = []
    for layer in (0, 2):
        states = random_states(rng, 400, layer=layer)
        spread = torch.from_numpy(np.linalg.qr(rng.normal(size=(24, 24)))[0]).float()
        key = (states.key * torch.logspace(0, 2, 24)) @ spread + 50.0
        covariance(dataclasses.replace(states, key=key))
        keys.append(key)
    rotations = covariance.rotations(3, 2)
    assert rotations.dtype == np.float32
    np.testing.assert_array_equal(rotations[1], np.tile(np.eye(24), (2, 1, 1)))
    for layer, key in zip((0, 2), keys, strict=True):
        for head, rotation in enumerate(rotations[layer]):
            np.testing.assert_allclose(rotation.T @ rotation, np.eye(24), atol=1e-5)
            variance = (key[head].double().numpy() @ rotation).var(axis=0)
            assert (np.diff(variance) <= 1e-3 * variance[:-1]).all()
            # The mean, far larger than any spread, is no direction of its own.
            assert variance[0] == pytest.approx(
                np.linalg.eigvalsh(np.cov(key[head].T)).max(), rel=0.02
            )


@pytest.mark.parametrize("kind", ["gqa", "mqa", "mha", "sliding", "gemma"])
def test_prepared_models_compute_what_eager_ones_do(rng, kind):
    register()
    ids = rng.integers(3, 64, 40).tolist()
    with torch.inference_mode():
        expected = build(kind)(torch.tensor([ids])).logits[0, [5, 39]]
    model = build(kind)
    prepare(model)
    torch.testing.assert_close(run(model, ids, [5, 39]), expected, rtol=1e-4, atol=1e-4)
    seen = []
    with hooked(lambda states: seen.append(states.layer)):
        torch.testing.assert_close(run(model, ids, [5, 39]), expected, rtol=1e-4, atol=1e-4)
    assert seen == list(range(model.config.num_hidden_layers))


def test_a_model_without_chat_template_goes_on_with_a_text(tokenizer):
    for kind, ids in question_prompts(tokenizer, [700], 2, 0):
        assert ids[0] == tokenizer.bos_token_id, kind
        assert tokenizer.eos_token_id not in ids
        assert 600 < len(ids) <= 700 - REPLY_TOKENS


@pytest.mark.parametrize("kind", ["gqa", "gemma"])
def test_replies_are_those_of_the_eager_model(rng, kind):
    register()
    prompt = rng.integers(3, 64, 50).tolist()
    expected = with_reply(build(kind), "lines", prompt)
    model = build(kind)
    prepare(model)
    assert with_reply(model, "lines", prompt) == expected
    # Token by token over a cache, where a wrong step may still have the right best token.
    with torch.inference_mode():
        step = model(torch.tensor([expected.ids[:-1]]), use_cache=True).past_key_values
        last = model(torch.tensor([expected.ids[-1:]]), past_key_values=step).logits[0, -1]
        whole = model(torch.tensor([expected.ids])).logits[0, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)
