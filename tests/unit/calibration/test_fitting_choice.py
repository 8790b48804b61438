"""Which candidate each head takes, and what decides it."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.anchors import NONE
from dam_vllm.calibration.fit.assemble import Assembler
from dam_vllm.calibration.fit.candidates import (
    DENSE,
    REUSE,
    Candidate,
    Pattern,
    candidates,
    layer_patterns,
)
from dam_vllm.calibration.fit.curve import Memory, Options, Point, curve, pick
from dam_vllm.calibration.fit.followers import TextFollowers
from dam_vllm.calibration.fit.losses import Sums, TextLosses, stratum_names, text_blocks
from dam_vllm.calibration.fit.probes import (
    alone,
    relative_errors,
    sensitivities,
    worst_by_part,
)
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.budget import TopP
from dam_vllm.masks.mask_set import HeadMode
from tests.oracle import dynamic_mask

PAGE, SIZE = 16, 8


def options(risks, densities, costs, layers):
    """What heads may become that read no other's pages; tails cost and do nothing if not given."""
    if risks.ndim == 4:
        risks, costs = np.stack([risks, risks]), np.stack([costs, costs + 0.01])
    shape, count = densities.shape[:2], densities.shape[2]
    return Options(
        risks,
        densities,
        costs,
        layers,
        anchors=np.full((*shape, 1), NONE),
        read_risks=np.full((2, shape[0], risks.shape[2], shape[1], 1, count), np.inf),
        read_densities=np.ones((*shape, 1, count)),
        read_costs=np.ones((2, *shape, 1, count)),
    )


def test_a_local_head_turns_static_a_seeking_one_dynamic_a_diffuse_one_dense():
    costs = np.array([[[0.1, 0.4]] * 3])
    costs = costs.reshape(1, 3, 2)
    local, seeking, diffuse = [1e-9, 1e-9], [0.5, 1e-6], [0.9, 0.9]
    risks = np.array([[local, seeking, diffuse]])[:, None]
    tight = pick(curve(options(risks, costs, costs, [0])), 1e-3, None)
    assert tight.chosen.tolist() == [[0, 1, DENSE]]
    assert tight.density == pytest.approx((0.1 + 0.4 + 1) / 3)
    assert tight.loss == pytest.approx(1e-6, rel=0.01)
    loose = pick(curve(options(risks, costs, costs, [0])), 2.0, None)
    assert loose.chosen.tolist() == [[0, 0, 0]]


def test_a_head_takes_a_tail_where_that_is_cheaper_than_reading_more():
    """Of two heads that spread, one is helped by a tail, the other needs more pages."""
    densities = np.array([[[0.1, 0.4]] * 2])
    alone = np.array([[[0.1, 1e-4], [0.1, 1e-4]]])[:, None]
    with_tail = np.array([[[2e-4, 1e-6], [0.09, 1e-4]]])[:, None]
    costs = np.stack([densities, densities + 0.02])
    found = pick(curve(options(np.stack([alone, with_tail]), densities, costs, [0])), 1e-3, None)
    assert found.chosen.tolist() == [[0, 1]]
    assert found.tails.tolist() == [[True, False]]
    assert found.loss == pytest.approx(3e-4)
    assert found.density == pytest.approx(0.25)
    assert found.cost == pytest.approx(0.26)


def test_readers_take_tails_too():
    """The one first that gains more."""
    densities, nothing = np.array([[[0.3], [0.9], [0.9]]]), np.full((1, 1, 3, 1), 1e-4)
    nothing[..., 1:, :] = 9.0
    read_risks = np.full((2, 1, 1, 3, 1, 1), np.inf)
    read_risks[..., 1:, 0, 0] = np.array([[0.5, 0.05], [1e-4, 1e-4]])[:, None, None]
    read = np.array([[[[1.0]], [[0.3]], [[0.3]]]])
    found = Options(
        np.stack([nothing] * 2), densities, np.stack([densities, densities + 0.02]), [0],
        np.array([[[NONE], [0], [0]]]), read_risks, read, np.stack([read, read + 0.02]),
    )  # fmt: skip
    for error, tails in (
        (1e-3, [False, True, True]),
        (0.1, [False, True, False]),
        (0.6, [False] * 3),
    ):
        taken = pick(curve(found), error, None)
        assert taken.chosen.tolist() == [[0, REUSE, REUSE]]
        assert taken.tails.tolist() == [tails]
        assert taken.cost == pytest.approx(0.3 + 0.02 * sum(tails) / 3)


def test_what_has_a_tail_keeps_all_its_pages():
    densities = np.full((1, 2, 1), 0.1)
    risks = np.array([np.full((1, 1, 2, 1), 0.1), np.full((1, 1, 2, 1), 0.001)])
    costs = np.stack([densities, densities + 0.02])
    every = options(risks, densities, costs, [0])
    assert pick(curve(every), 0.01, None).tails.all()
    for point in curve(every, Memory(np.array([False]), 0.0)):
        assert not point.tails.any()


def test_loosening_never_costs_more(rng):
    risks = rng.random((3, 2, 4, 9)) ** 4
    densities = rng.random((3, 4, 9))
    costs = densities + rng.random(9) * 0.2
    points = curve(options(risks, densities, costs, [0, 2]))
    assert (points[0].loss, points[0].density) == (0.0, 1.0)
    for target in (0.01, 0.1, 1.0):
        found = pick(points, target, None)
        assert found.loss <= target
        assert found.cost == min(point.cost for point in points if point.loss <= target)
        taken = [
            risks[layer, :, head, index]
            for layer in (0, 2)
            for head, index in enumerate(found.chosen[layer])
            if index != DENSE
        ]
        assert found.loss == pytest.approx(float(np.sum(taken, axis=0).max()))
    assert pick(points, None, 0.5).density <= 0.5
    with pytest.raises(CalibrationError, match=r"target_density is 1e-05, must be at least 0\."):
        pick(points, None, 1e-5)


def test_memory_bounds_the_heads_that_keep_all_pages(rng):
    """Candidates 0 to 3 are static; what is kept beyond the target becomes one of them."""
    risks = rng.random((3, 2, 4, 9)) ** 4
    densities = rng.random((3, 4, 9))
    keeps = np.arange(9) > 3
    layers = [0, 2]

    def kept(point):
        chosen = point.chosen[layers]
        return ((chosen == DENSE) | keeps[chosen]).mean()

    losses = []
    for target in (0.75, 0.5, 0.25, 0.0):
        points = curve(options(risks, densities, densities, layers), Memory(keeps, target))
        assert max(kept(point) for point in points) <= target
        losses.append(pick(points, None, 0.6).loss)
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


def test_no_choice_may_fit_into_the_memory():
    risks, densities = np.ones((1, 1, 2, 1)), np.ones((1, 2, 1))
    with pytest.raises(CalibrationError, match=r"target_kv_memory is 0\.5: no choice"):
        curve(options(risks, densities, densities, [0]), Memory(np.array([True]), 0.5))


def test_a_head_matters_between_itself_and_its_layer():
    """Two heads that stand in for each other: neither is missed alone, both together are."""
    errors = np.full((1, 1, 1, 2), 0.5)
    kls = np.array([[[[0.0, 0.02, 2.0]]]])
    np.testing.assert_allclose(sensitivities(kls, errors, 0.0), [[[0.0, 0.04]]])
    np.testing.assert_allclose(sensitivities(kls, errors, 0.5), [[[0.0, np.sqrt(0.04 * 2)]]])
    np.testing.assert_allclose(sensitivities(kls, errors, 1.0), [[[2.0, 2.0]]])
    kls = np.array([[[[0.0, 4.0, 3.0]]]])
    np.testing.assert_allclose(sensitivities(kls, errors, 1.0), [[[3.0, 8.0]]])
    unknown = np.concatenate([errors, np.zeros((1, 1, 1, 2))], axis=1)
    kls = np.array([[[[0.0, 1.0, 0.5]], [[9.0, 9.0, 9.0]]]])
    for trust in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(sensitivities(kls, unknown, trust)[1], [[2.0, 2.0]])


def test_a_head_that_was_not_probed_alone_matters_as_its_layer():
    errors = np.array([[[[0.5, 0.25]]]])
    kls = np.array([[[[np.nan, np.nan, 3.0]]]])
    for trust in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(sensitivities(kls, errors, trust), [[[4.0, 4.0]]])


def test_alone(random_masks):
    masks = random_masks(layers=2, heads=4, kv_heads=2, dynamic=True)
    dense = HeadMode.DENSE
    assert alone(masks, 1, 1).modes.tolist() == [[dense, dense], [dense, HeadMode.DYNAMIC]]
    assert alone(masks, 0, 2).modes.tolist() == [masks.modes[0].tolist(), [dense, dense]]


def test_worst_length_counts_in_each_part():
    errors = np.arange(6.0).reshape(1, 6, 1, 1)
    strata = ["plain/context/any", "kv/context/256", "kv/reply/512", "kv/question/256",
              "lines/context/256", "kv/reply/256"]  # fmt: skip
    context, question, reply = worst_by_part(errors, strata)
    assert context.ravel().tolist() == [0.0, 1.0, 4.0]
    assert question.ravel().tolist() == [0.0, 3.0, 0.0]
    assert reply.ravel().tolist() == [0.0, 5.0, 0.0]


def test_groups_tell_kinds_parts_and_lengths_apart():
    texts = [FitText("plain", [], 700), FitText("kv", [], 240), FitText("kv", [], 500)]
    assert stratum_names(texts, [256, 512]) == [
        "plain/context/any",
        *(f"kv/{part}/{size}" for size in (256, 512) for part in ("context", "question", "reply")),
    ]  # fmt: skip


@pytest.fixture
def patterns(random_masks):
    """A bare pattern and a random one, of the same shape."""
    some = random_masks(layers=1, heads=4, kv_heads=2, pcl=64, share=0.05)
    bare = dataclasses.replace(
        some,
        columns=np.zeros_like(some.columns),
        diagonals=np.zeros_like(some.diagonals),
        true_bits=np.zeros_like(some.true_bits),
    )
    return [Pattern(str(number), partial(copy, each)) for number, each in enumerate((bare, some))]


def copy(masks):
    names = ("columns", "diagonals", "true_bits")
    return dataclasses.replace(masks, **{name: getattr(masks, name).copy() for name in names})


def test_losses_are_those_of_the_masks_that_are_served(rng, patterns):
    """Every candidate's error, against naive attention under the assembled masks."""
    torch.manual_seed(int(rng.integers(2**31)))
    prompt, tokens = 300, 309
    text = FitText("kv", [0] * tokens, prompt)
    states = LayerStates(
        0, torch.randn(4, tokens, SIZE) * 2, torch.randn(2, tokens, SIZE),
        torch.randn(2, tokens, SIZE), 0.4, 0.0,
    )  # fmt: skip
    rotations = np.linalg.qr(rng.normal(size=(1, 2, SIZE, SIZE)))[0].astype("f4")
    mass = Candidate(0, 5, TopP(0.8, 1, 3))
    each = [*candidates(patterns, 0, [5])[::4], mass, Candidate(1)]
    strata = stratum_names([text], [256, 512])
    sums = Sums.empty(strata, 1, 2, len(each))
    blocks = text_blocks(text, strata, [256, 512], 2, PAGE, 128, rng)
    pages = layer_patterns(patterns, 0, [0], PAGE)
    TextLosses(sums, blocks, pages, each, len(each) - 2, rotations, PAGE)(states)
    assembler = Assembler(
        patterns[0].build(), pages, each, rotations, np.zeros((1, 2, len(each))), PAGE
    )
    whole = naive(states, torch.ones(4, tokens, tokens, dtype=torch.bool).tril())
    rows = {index: [] for index in range(len(strata))}
    for block in blocks:
        rows[block.stratum] += block.position.flatten().tolist()
    assert set(rows[strata.index("kv/reply/256")]) == set(range(prompt, tokens))
    for index, candidate in enumerate(each):
        nobody = np.full((1, 2), NONE)
        masks = assembler.masks(Point(0.0, 1.0, 1.0, np.full((1, 2), index), nobody, nobody == 0))
        for tail, head in itertools.product(range(2), range(2)):
            error = naive(states, served(masks, states, head, prompt), [head] * tail) - whole
            error = error[:, 2 * head : 2 * head + 2].square().sum(dim=(1, 2))
            for stratum, positions in rows.items():
                expected = float(error[positions].sum())
                found = sums.error[tail, 0, stratum, head, index]
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), (candidate, strata)
    norms = whole.square().sum(dim=(1, 2))
    for stratum, positions in rows.items():
        assert sums.norm[0, stratum] == pytest.approx(float(norms[positions].sum()), rel=1e-4)
    np.testing.assert_allclose(
        relative_errors(sums)[1, 0, 1], sums.error[1, 0, 1] / sums.norm[0, 1], rtol=1e-9
    )


def test_readers_lose_what_masks_that_reuse_pages_lose(rng, patterns):
    """Head 1 reads what head 0 chose, by each of its candidates, and the other way round."""
    torch.manual_seed(int(rng.integers(2**31)))
    prompt, tokens = 300, 309
    text = FitText("kv", [0] * tokens, prompt)
    states = LayerStates(
        0, torch.randn(4, tokens, SIZE) * 2, torch.randn(2, tokens, SIZE),
        torch.randn(2, tokens, SIZE), 0.4, 0.0,
    )  # fmt: skip
    rotations = np.linalg.qr(rng.normal(size=(1, 2, SIZE, SIZE)))[0].astype("f4")
    each = [*candidates(patterns, 0, [5])[::4], Candidate(0, 5, TopP(0.8, 1, 3))]
    strata = stratum_names([text], [256])
    blocks = text_blocks(text, strata, [256], 2, PAGE, 128, rng)
    pages = layer_patterns(patterns, 0, [0], PAGE)
    dynamic = [index for index, candidate in enumerate(each) if candidate.budget]
    tried = np.zeros((1, 2, len(each)), dtype=bool)
    tried[:, :, dynamic] = True
    tried[:, 0, dynamic[0]] = False
    error = np.zeros((2, 1, len(strata), 2, 2, len(each)))
    anchors = np.array([[1, NONE], [0, NONE]])
    TextFollowers(
        error, [part for block in blocks for part in block.split(3)], pages, each, anchors, tried,
        rotations, PAGE,
    )(states)  # fmt: skip
    assembler = Assembler(
        patterns[0].build(), pages, each, rotations, np.zeros((1, 2, len(each))), PAGE
    )
    whole = naive(states, torch.ones(4, tokens, tokens, dtype=torch.bool).tril())
    assert not error[..., 1, :].any()
    assert not error[:, 0, :, 1, 0, dynamic[0]].any()
    for head in range(2):
        for index in dynamic[1:]:
            chosen = np.full((1, 2), index)
            chosen[0, head] = REUSE
            flat = np.full((1, 2), NONE)
            flat[0, head] = 1 - head
            masks = assembler.masks(Point(0.0, 1.0, 1.0, chosen, flat, flat == 1 - head))
            assert masks.tails[0].tolist() == [head == 0, head == 1]
            assert masks.anchors[0, head].tolist() == [0, 1 - head]
            static = torch.from_numpy(page_mask(masks, 0, 0, tokens, PAGE, query_block=PAGE))
            kept = served(masks, states, 1 - head, prompt)
            kept = kept[2 * (1 - head) : 2 * (1 - head) + 2]
            mask = torch.ones(4, tokens, tokens, dtype=torch.bool).tril()
            mask[2 * head : 2 * head + 2] = static[2 * head : 2 * head + 2] | kept
            for tail, stratum in itertools.product(range(2), range(len(strata))):
                lost = naive(states, mask, [head] * tail) - whole
                lost = lost[:, 2 * head : 2 * head + 2].square().sum(dim=(1, 2))
                rows = [
                    row for block in blocks if block.stratum == stratum
                    for row in block.position.flatten().tolist()
                ]  # fmt: skip
                found = error[tail, 0, stratum, head, 0, index]
                assert found == pytest.approx(float(lost[rows].sum()), rel=1e-3, abs=1e-4)


def naive(states, mask, tails=()):
    query, key, value = (part.transpose(0, 1) for part in (states.query, states.key, states.value))
    return masked_attention(query, key, value, mask, states.scale, tails=tails, page=PAGE)


def served(masks, states, head, prompt):
    """Masks of all heads; the prompt's queries a page together, later ones on their own."""
    tokens = states.query.shape[1]
    if masks.dynamic is None:
        return torch.from_numpy(page_mask(masks, 0, 0, tokens, PAGE))
    static = page_mask(masks, 0, 0, tokens, PAGE, query_block=PAGE)
    result = torch.from_numpy(static.copy())
    rotation = torch.from_numpy(masks.dynamic.rotations[0, head])
    query = states.query[2 * head : 2 * head + 2].transpose(0, 1) @ rotation
    key = states.key[head] @ rotation
    parts = [(0, prompt), *((row, row + 1) for row in range(prompt, tokens))]
    for start, stop in parts:
        mask = dynamic_mask(
            masks, 0, head, query[start:stop], key[:stop], static[2 * head, start:stop, :stop],
            PAGE, states.scale,
        )  # fmt: skip
        result[2 * head : 2 * head + 2, start:stop, :stop] = torch.from_numpy(mask)
    return result
