import numpy as np
import pytest
import torch

from dam_vllm.calibration import capture
from dam_vllm.calibration.capture import observe_forward, register
from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.states import hooked, run
from dam_vllm.calibration.static.maps import MapSums, pair_counts
from dam_vllm.calibration.texts import pad
from tests.unit.calibration.conftest import CONFIGS, build

FULL = {"gqa": [0, 1, 2], "mqa": [0, 1, 2], "mha": [0, 1, 2], "gemma": [1, 3], "sliding": [0, 1]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of few queries that do not divide the lengths."""
    register()
    monkeypatch.setattr(capture, "BLOCK_BYTES", 4 * 4 * 19 * 5)


def windows(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_equal_eager_attention(kind, padded):
    ids, _ = pad(windows([19, 19]))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 11:] = 0
    eager, captured = build(kind), build(kind, capture.IMPLEMENTATION)
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask).logits
        layers = frozenset([*FULL[kind], 99])  # no layer 99, so nothing stops early
        with capture.hooked(capture._Weights(layers, lambda *block: None)):
            found = captured(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_mean_maps_equal_the_average_of_eager_weights(kind):
    texts, pcl, layers = windows([19, 12, 5, 17, 1]), 14, FULL[kind]
    sums = MapSums(layers, torch.zeros(len(layers), 4, pcl, pcl))
    model = build(kind, capture.IMPLEMENTATION)
    for batch in (texts[:2], texts[2:]):
        ids, lengths = pad(batch)
        sums.start_batch(lengths)
        observe_forward(model, ids, layers, sums.observe)
    total, count = np.zeros((len(layers), 4, pcl, pcl)), np.zeros((pcl, pcl))
    eager = build(kind)
    for text in texts:
        with torch.no_grad():
            weights = eager(torch.tensor([text]), output_attentions=True).attentions
        n = min(len(text), pcl)
        total[:, :, :n, :n] += torch.stack([weights[i][0] for i in layers])[:, :, :n, :n].numpy()
        count[:n, :n] += 1
    expected = total / (count + 1e-8)
    counts = pair_counts([len(text) for text in texts], pcl)
    assert counts.tolist() == [5, *[4] * 4, *[3] * 7, 2, 2]
    for slot, layer in enumerate(layers):
        found = sums.mean(layer, counts, 1e-8).numpy()
        np.testing.assert_allclose(found, expected[slot], rtol=1e-4, atol=1e-6)


def test_no_block_of_weights_is_larger_than_allowed():
    sizes = []
    observe_forward(
        build("gqa", capture.IMPLEMENTATION),
        torch.tensor(windows([19])),
        [1],
        lambda layer, start, weights: sizes.append((start, weights.shape)),
    )
    assert [start for start, _ in sizes] == [0, 5, 10, 15]
    assert all(shape[2] <= 5 and shape[3] == min(start + 5, 19) for start, shape in sizes)


def test_a_model_without_the_interface_is_refused():
    with pytest.raises(CalibrationError, match="does not use transformers' attention interface"):
        observe_forward(build("gqa"), torch.tensor(windows([5])), [1], lambda *block: None)


def test_one_function_shows_weights_and_states():
    """The fit's queries and keys give the weights that Stage 1 is shown."""
    model, (text,) = build("gqa", capture.IMPLEMENTATION), windows([19])
    blocks, states = [], {}
    observe_forward(model, torch.tensor([text]), [1], lambda *block: blocks.append(block[2]))
    with hooked(lambda each: states.setdefault(each.layer, each) and None):
        logits = run(model, text)
    query, key = states[1].query, states[1].key.repeat_interleave(states[1].heads_per_kv, dim=0)
    later = torch.ones(19, 19, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(1, 2) * states[1].scale).masked_fill(later, float("-inf"))
    found = torch.zeros(len(query), 19, 19)
    for start, block in zip((0, 5, 10, 15), blocks, strict=True):
        found[:, start : start + block.shape[2], : block.shape[3]] = block[0]
    torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected = build("gqa")(torch.tensor([text])).logits[0, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
