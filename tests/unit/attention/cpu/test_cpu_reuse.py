"""Heads that reuse chosen pages, through all layers of a step, against the plain definition."""

import dataclasses

import numpy as np
import pytest
import torch

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import page_mask
from dam_vllm.attention.oracle_attention import OracleAttention, OracleLayer
from dam_vllm.attention.page_counts import PageCounts
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.sharding import Shard
from tests.unit.attention.cpu.layer_steps import SCALE, SIZE, Model, attention_of, share_close

REQUESTS = [(0, 303, 303), (1, 1, 417), (2, 77, 390), (3, 1, 1), (4, 2, 97)]


@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("dense_below", [0, 130])
@pytest.mark.parametrize("groups", [1, 2])
def test_reusing_heads_read_what_their_anchors_chose(rng, random_masks, page, dense_below, groups):
    masks = random_masks(
        layers=4, heads=8, kv_heads=4, share=0.002, dense=True, dynamic=True, reuse=True
    )
    model = Model(rng, masks, page, [stop for _, _, stop in REQUESTS])
    attention = attention_of(masks, page, dense_below, groups)
    found = model.run(attention, REQUESTS)
    for each, expected in zip(found, model.expected(REQUESTS, dense_below), strict=True):
        assert share_close(each, expected) > 0.985
    assert not attention.chosen._kept  # the last follower let it go


def test_several_follow_one_anchor_of_their_layer_and_of_earlier_ones(rng, random_masks):
    masks = random_masks(layers=3, heads=4, kv_heads=4, share=0.002, dynamic=True, reuse=True)
    masks.modes[:] = HeadMode.STATIC
    masks.anchors[:] = -1
    masks.modes[0, 1] = masks.modes[1, 3] = HeadMode.DYNAMIC
    follows = {(0, 0): (0, 1), (1, 2): (0, 1), (2, 1): (0, 1), (2, 3): (1, 3), (1, 0): (1, 3)}
    for follower, anchor in follows.items():
        masks.modes[follower], masks.anchors[follower] = HeadMode.REUSE, anchor
    masks.dynamic.budgets[0, 1] = masks.dynamic.budgets[1, 3] = 0.3
    masks.dynamic.kinds[:], masks.dynamic.floors[:] = 2, 40
    model = Model(rng, masks, 16, [340])
    attention = attention_of(masks, 16)
    (found,) = model.run(attention, [(0, 340, 340)])
    (expected,) = model.expected([(0, 340, 340)])
    assert share_close(found, expected) > 0.985
    for (layer, head), _ in follows.items():
        masks.modes[layer, head] = HeadMode.STATIC
        masks.anchors[layer, head] = -1
    (unlike,) = model.expected([(0, 340, 340)])
    for layer, head in follows:
        assert (
            share_close(found[layer, :, head : head + 1], unlike[layer, :, head : head + 1]) < 0.9
        )


def test_chunks_and_batches_change_nothing(rng, random_masks):
    """Bit for bit, where chunks end at pages and decoding goes one by one."""
    masks = random_masks(layers=3, heads=8, kv_heads=4, share=0.002, dynamic=True, reuse=True)
    page = 16
    model = Model(rng, masks, page, [411, 300, 97])
    attention = attention_of(masks, page)
    (whole,) = model.run(attention, [(0, 400, 400)])
    singles = [model.run(attention, [(0, 1, stop)])[0] for stop in range(401, 404)]
    parts = []
    for done, stop, other in (
        (0, 160, (1, 176, 176)),
        (160, 336, (2, 1, 97)),
        (336, 400, (1, 1, 177)),
    ):
        batch = [other, (0, stop - done, stop)]
        parts.append(model.run(attention, batch)[1])
    assert torch.equal(torch.cat(parts, dim=1), whole)
    for stop, single in enumerate(singles, 401):
        mixed = model.run(attention, [(1, 100, 276), (0, 1, stop), (2, 33, 97)])
        assert torch.equal(mixed[1], single)


def test_what_they_read_is_counted(rng, random_masks):
    """Where nothing is static and anchors choose all, followers read what dense attention does."""
    masks = random_masks(layers=2, heads=2, kv_heads=2, share=0, dynamic=True, reuse=True)
    masks.modes[0, 0] = HeadMode.DENSE
    assert masks.modes[1, 0] == HeadMode.REUSE
    masks.dynamic.floors[:], masks.dynamic.caps[:] = 400, 400
    counts = PageCounts([0, 1], 2, 0, torch.device("cpu"))
    model = Model(rng, masks, 16, [333, 20])
    model.run(attention_of(masks, 16, counts=counts), [(0, 333, 333), (1, 1, 20)])
    told = counts.report()
    assert told["read"] == told["dense"]
    pages = int((torch.arange(333) // 16 + 1).sum())
    # A static or dense head's query block of 128 reads up to its own end, and so is it counted.
    blocks = int(((torch.arange(333) // 128 + 1) * 8).clamp(max=21).sum())
    assert told["read"]["prefill"] == [[blocks, pages], [pages, pages]]
    assert told["read"]["decode"] == [[2, 2], [2, 2]]


@pytest.mark.parametrize("groups", [1, 2])
def test_counts_are_those_of_the_definition(rng, random_masks, groups):
    """Step after step: heads of all modes, in layers that are planned together or apart."""
    masks = random_masks(
        layers=4, heads=8, kv_heads=4, share=0.002, dense=True, dynamic=True, reuse=True
    )
    counts = PageCounts(range(4), 4, 0, torch.device("cpu"))
    model = Model(rng, masks, 16, [stop for _, _, stop in REQUESTS])
    attention = attention_of(masks, 16, 130, groups, counts=counts)
    fixed = np.isin(masks.modes, (HeadMode.STATIC, HeadMode.DENSE))
    wanted = np.zeros((2, 4, 4), int)
    for _ in range(2):
        model.run(attention, REQUESTS)
        for _, new, stop in REQUESTS:
            for layer in range(4):
                seen = page_mask(masks, layer, stop - new, stop, 16, 130)[::2]
                padded = np.pad(seen, ((0, 0), (0, 0), (0, -stop % 16)))
                # A query block reads as its last query does.
                last = [min(at | 127, stop - 1) - stop + new for at in range(stop - new, stop)]
                pages = padded.reshape(4, new, -1, 16).any(axis=3)[:, last].sum(axis=(1, 2))
                wanted[int(new == 1), layer] += pages
    told = counts.report()
    for phase, name in enumerate(("prefill", "decode")):
        found, dense = np.array(told["read"][name]), np.array(told["dense"][name])
        assert (found[fixed] == wanted[phase][fixed]).all()
        assert (found <= dense).all()
        assert (found[~fixed] > 0).all()
        assert sum(told["steps"][name]) == 2
    assert (
        np.array(told["read"]["prefill"])[~fixed] < np.array(told["dense"]["prefill"])[~fixed]
    ).all()


@pytest.mark.parametrize("naive", [False, True])
def test_a_rank_counts_its_heads_from_its_own_first_one(rng, random_masks, naive):
    masks = random_masks(
        layers=3, heads=8, kv_heads=4, share=0.002, dynamic=True, reuse=True, head_size=SIZE
    )
    masks.anchors[..., 1][masks.modes == HeadMode.REUSE] = 3  # on the rank of heads 2 and 3
    model, shard = Model(rng, masks, 16, [stop for _, _, stop in REQUESTS]), Shard(2, 4)
    make = naive_attention_of if naive else attention_of
    found = model.run(make(masks, 16, shard=shard), REQUESTS, shard)
    for each, expected in zip(found, model.expected(REQUESTS), strict=True):
        assert share_close(each, expected[:, :, 4:]) > 0.985


def naive_attention_of(masks, page, dense_below=0, shard=None):
    shard = shard or Shard(0, masks.kv_heads)
    layers = {str(layer): OracleLayer(layer, SCALE, 0.0) for layer in range(masks.layers)}
    chosen = ChosenPages.of_masks(masks, shard)
    return OracleAttention(layers, masks, shard, KVLayout(True), False, dense_below, chosen)


def test_naive_kernel_is_the_definition(rng, random_masks):
    masks = random_masks(
        layers=4, heads=8, kv_heads=4, share=0.002, dense=True, dynamic=True, reuse=True
    )
    model = Model(rng, masks, 16, [stop for _, _, stop in REQUESTS])
    naive = naive_attention_of(masks, 16, 130)
    found = model.run(naive, REQUESTS)
    for each, expected in zip(found, model.expected(REQUESTS, 130), strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)
    assert not naive.chosen._kept


@pytest.mark.parametrize("naive", [False, True])
def test_ranks_that_share_a_kv_head_choose_for_their_own_query_heads(rng, random_masks, naive):
    """As one rank does that holds a copy of the KV head for each of them."""
    drawn = random_masks(layers=3, heads=4, kv_heads=1, share=0.002, dynamic=True, head_size=SIZE)
    for array in (drawn.columns, drawn.diagonals, drawn.true_bits):
        array[:] = array[:, :1]
    modes = np.array([HeadMode.STATIC, HeadMode.DYNAMIC, HeadMode.REUSE], np.uint8)[:, None]
    anchors = np.full((3, 1, 2), -1, np.int32)
    anchors[2, 0] = 1, 0
    one = dataclasses.replace(drawn, modes=modes, anchors=anchors)
    copied = {name: array.repeat(2, axis=1) for name, array in vars(one.dynamic).items()}
    two = dataclasses.replace(
        one, modes=modes.repeat(2, axis=1),
        anchors=np.array([[[-1, -1]] * 2] * 2 + [[[1, 0], [1, 1]]], np.int32),
        dynamic=dataclasses.replace(one.dynamic, **copied),
    )  # fmt: skip
    model = Model(rng, one, 16, [stop for _, _, stop in REQUESTS])
    whole = Model(rng, two, 16, [stop for _, _, stop in REQUESTS])
    whole.queries = model.queries
    for copies, kept in ((whole.keys, model.keys), (whole.values, model.values)):
        copies[:] = [[each.repeat(1, 2, 1) for each in layer] for layer in kept]
    make = naive_attention_of if naive else attention_of
    for part in range(2):
        shard = Shard(0, 1, part, 2)
        found = model.run(make(one, 16, shard=shard), REQUESTS, shard)
        for each, expected in zip(found, whole.expected(REQUESTS), strict=True):
            assert share_close(each, expected[:, :, shard.query_heads(one)]) > 0.985
