"""Tails of heads, through all layers of steps, against the plain definition."""

import dataclasses

import numpy as np
import pytest
import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.kernel import UnreadSpans
from dam_vllm.attention.cpu.span_means import EndedSpans
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.sharding import Shard
from dam_vllm.masks.tails import span_pages
from tests.conftest import random_mask_set
from tests.unit.attention.cpu.layer_steps import Form, Model, attention_of, share_close

# Lengths of requests, and steps of them: row, new queries, tokens so far.
LENGTHS = [911, 417, 130, 1, 700]
STEPS = [
    [(0, 303, 303), (1, 256, 256), (3, 1, 1)],
    [(1, 160, 416), (0, 416, 719), (2, 130, 130)],
    [(4, 700, 700), (0, 1, 720), (1, 1, 417)],
    [(0, 191, 911)],
]  # fmt: skip
# Queries that look at many keys, so that spans weigh something.
FLAT = Form(factor=0.3)


@pytest.fixture
def without_llvm(monkeypatch):
    assert llvm.compiles()
    monkeypatch.setattr(llvm, "compiles", lambda: False)


@pytest.fixture
def tailed(rng):
    """Makes masks whose heads of all modes have tails, and read little."""

    def make(heads_per_kv=2, layers=3, size=FLAT.size):
        masks = random_mask_set(
            rng, layers=layers, heads=4 * heads_per_kv, kv_heads=4, share=0.001, dense=True,
            dynamic=True, reuse=True, tails=True, head_size=size,
        )  # fmt: skip
        # Behind a head that chooses.
        masks.modes[2, 2], masks.anchors[2, 2] = HeadMode.STATIC, -1
        for mode in (HeadMode.STATIC, HeadMode.DYNAMIC, HeadMode.REUSE):
            masks.tails[tuple(np.argwhere(masks.modes == mode)[-1])] = 1
        return masks

    return make


def without_tails(masks):
    return dataclasses.replace(masks, tails=None)


def check(model, attention, steps=STEPS, dense_below=0, shard=None):
    """Runs steps one after another; in the last one tails are no small thing."""
    local = (shard or Shard(0, model.masks.kv_heads)).query_heads(model.masks)
    for step in steps:
        found, expected = model.run(attention, step, shard), model.expected(step, dense_below)
        for ours, theirs in zip(found, expected, strict=True):
            assert share_close(ours, theirs[:, :, local]) > 0.985
    masks, model.masks = model.masks, without_tails(model.masks)
    assert share_close(found[0], model.expected(steps[-1], dense_below)[0][:, :, local]) < 0.9
    model.masks = masks


@pytest.mark.parametrize(
    ("page", "heads_per_kv", "size", "softcap"),
    [(16, 1, 24, 0.0), (32, 2, 128, 2.0), (48, 3, 40, 0.0), (160, 4, 64, 0.0)],
)
def test_tails_are_the_definition(rng, tailed, lanes, page, heads_per_kv, size, softcap):
    masks = tailed(heads_per_kv, size=size)
    form = dataclasses.replace(FLAT, size=size, softcap=softcap)
    model = Model(rng, masks, page, LENGTHS, form)
    check(model, attention_of(masks, page, form=form))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_without_llvm(rng, tailed, without_llvm, softcap):
    form = dataclasses.replace(FLAT, softcap=softcap)
    masks = tailed()
    model = Model(rng, masks, 32, LENGTHS, form)
    check(model, attention_of(masks, 32, form=form))


@pytest.mark.parametrize("groups", [1, 2])
def test_below_dense_below_nothing_is_unread(rng, tailed, groups):
    masks = tailed()
    model = Model(rng, masks, 16, LENGTHS, FLAT)
    check(model, attention_of(masks, 16, 400, groups, form=FLAT), dense_below=400)


def test_a_rank_has_the_tails_of_its_heads(rng, tailed):
    masks, shard = tailed(), Shard(2, 4)
    masks.anchors[..., 1][masks.modes == HeadMode.REUSE] = 3  # on the same rank
    masks.tails[:, 2] = 1
    model = Model(rng, masks, 16, LENGTHS, FLAT)
    check(model, attention_of(masks, 16, shard=shard, form=FLAT), shard=shard)


@pytest.mark.parametrize(
    ("dtype", "stored", "error"),
    [
        (torch.bfloat16, None, 0.03),
        (torch.float16, None, 0.004),
        (torch.bfloat16, torch.float8_e4m3fn, 0.03),
        (torch.bfloat16, torch.float8_e5m2, 0.03),
        (torch.float16, torch.float8_e4m3fn, 0.004),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_other_dtypes(rng, tailed, lanes, monkeypatch, dtype, stored, error, compiled):
    """Static heads, whose pages rounding does not decide about."""
    if not compiled:
        monkeypatch.setattr(llvm, "compiles", lambda: False)
    masks = tailed()
    masks.modes[masks.modes != HeadMode.DENSE] = HeadMode.STATIC
    masks = dataclasses.replace(masks, dynamic=None, anchors=None)
    scales = (0.5, 0.25) if stored else (1.0, 1.0)
    form = dataclasses.replace(FLAT, dtype=dtype, stored=stored, scales=scales)
    model = Model(rng, masks, 32, LENGTHS, form)
    attention = attention_of(masks, 32, form=form)
    for step in STEPS:
        for ours, theirs in zip(model.run(attention, step), model.expected(step), strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_chunks_batches_and_threads_change_nothing(rng, tailed, monkeypatch, dtype, compiled):
    """Bit for bit, where chunks end at pages."""
    if not compiled:
        monkeypatch.setattr(llvm, "compiles", lambda: False)
    masks, form = tailed(), dataclasses.replace(FLAT, dtype=dtype)
    model = Model(rng, masks, 16, [611, 300, 97], form)
    (whole,) = model.run(attention_of(masks, 16, form=form), [(0, 608, 608)])
    attention, parts = attention_of(masks, 16, form=form), []
    threads = torch.get_num_threads()
    try:
        for done, stop, other in (
            (0, 160, (1, 176, 176)),
            (160, 336, (2, 97, 97)),
            (336, 608, (1, 1, 177)),
        ):
            torch.set_num_threads(1 + done % 3)
            parts.append(model.run(attention, [other, (0, stop - done, stop)])[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    (single,) = model.run(attention, [(0, 1, 609)])
    mixed = model.run(attention, [(1, 100, 277), (0, 1, 609), (2, 33, 97)])
    assert torch.equal(mixed[1], single)


def test_a_request_that_begins_on_cached_pages(rng, tailed):
    """Bit for bit: means of its first spans were written for another request."""
    masks, page, hit = tailed(), 16, 400
    model = Model(rng, masks, page, [560, 700], FLAT)
    for layer in range(masks.layers):
        for each in (model.queries, model.keys, model.values):
            each[layer][1][:hit] = each[layer][0][:hit]
    (alone,) = model.run(attention_of(masks, page, form=FLAT), [(1, 700, 700)])
    model.blocks[1][: hit // page] = model.blocks[0][: hit // page]
    attention = attention_of(masks, page, form=FLAT)
    model.run(attention, [(0, 560, 560)])
    (found,) = model.run(attention, [(1, 700 - hit, 700)])
    assert torch.equal(found, alone[:, hit:])


def test_means_of_steps_that_read_everything(rng, tailed):
    masks = tailed()
    model = Model(rng, masks, 16, LENGTHS, FLAT)
    attention = attention_of(masks, 16, 384, form=FLAT)
    part, step = attention.part(0), model.step([(0, 303, 303), (1, 200, 200)])
    assert part.ends_spans(step)
    plan = part.plan_dense(step)
    for layer in range(masks.layers):
        cache = model.cache(attention, layer, Shard(0, 4))
        model.fill(cache, layer, [(0, 303, 303), (1, 200, 200)], Shard(0, 4))
        query = torch.zeros(503, masks.heads, FLAT.size)
        part.run(plan, str(layer), query, cache, torch.empty_like(query))
    check(model, attention, [[(0, 608, 911), (1, 217, 417)]], dense_below=384)
    assert not part.ends_spans(model.step([(0, 80, 383), (1, 1, 1)]))


def test_steps_shorter_than_a_span(rng, tailed):
    model = Model(rng, tailed(), 16, [50, 97], FLAT)
    requests = [(0, 50, 50), (1, 97, 97)]
    found = model.run(attention_of(model.masks, 16, form=FLAT), requests)
    for each, expected in zip(found, model.expected(requests), strict=True):
        assert share_close(each, expected) > 0.985


def test_what_has_no_tail_pays_nothing(rng, tailed):
    masks = tailed()
    masks.tails[2] = 0
    model = Model(rng, masks, 16, LENGTHS, FLAT)
    attention = attention_of(masks, 16, form=FLAT)
    step = model.step(STEPS[2])
    (plan,) = attention.plan(step)
    assert plan.fixed["2"].unread is None
    assert plan.ended is not None
    part, query = attention.part(0), torch.zeros(step.tokens, masks.heads, FLAT.size)
    cache = model.empty_cache(Shard(0, 4))
    part.run(part.plan_dense(step), "2", query, cache, torch.empty_like(query))
    assert not part._tails.means._beside
    part = attention_of(without_tails(masks), 16, form=FLAT).part(0)
    plan = part.plan(step)
    assert plan.ended is None
    assert not any(batch.unread for batch in plan.fixed.values() if batch)
    assert not part.ends_spans(step)


@pytest.mark.parametrize("page", [16, 48, 160])
def test_spans_that_end(rng, page):
    """Every token is looked at."""
    lengths = [911, 417, 130, 1, 700]
    model = Model(rng, random_mask_set(rng), page, lengths)
    span = span_pages(page) * page
    for step in STEPS:
        expected = [
            (at, [position // page - back for back in reversed(range(span_pages(page)))])
            for at, (_, new, stop) in enumerate(step)
            for position in range(stop - new, stop)
            if (position + 1) % span == 0
        ]
        found = EndedSpans.of(model.step(step), page)
        told = [] if found is None else [found.request[:, 0].tolist(), found.pages.tolist()]
        assert list(zip(*told, strict=True)) == expected
        assert (found is None) == (not expected)


def test_sequences_are_numbered_among_their_heads():
    unread = UnreadSpans(torch.tensor([3, 5, 9, 11]), torch.empty(0), torch.empty(0))
    assert unread.among([1, 3], 3).sequences.tolist() == [0, 2, 3, 5]
