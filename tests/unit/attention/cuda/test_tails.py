"""Tails of several layers against the oracle: means written in one step, read in later ones."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dam_vllm.attention.span_means import SpanMeans
from dam_vllm.masks.tails import span_pages
from tests.unit.attention.cuda.launches import Launches
from tests.unit.attention.cuda.layer_steps import (
    KV_HEADS,
    LIMITS,
    MIXED,
    SCALES,
    SIZE,
    STATIC,
    STEPS,
    attention,
    expected,
    layer_masks,
    make_step,
    rotate_queries,
    run,
    step_of,
)
from tests.unit.attention.cuda.no_sync import no_sync

pytestmark = pytest.mark.slow

DECODE, WIDE = (*STEPS["decode"], (0, 0)), ((600, 1), (550, 30))
FP8 = torch.float8_e4m3fn
# Few pages are read, so that most spans are unread.
SHARE = 0.0003


@pytest.fixture
def masks(random_masks):
    made = layer_masks(random_masks, SHARE, tails=True)
    # Static heads and choosing ones, with and without, beside each other; a layer without.
    made.tails[0], made.tails[1], made.tails[2], made.tails[4] = (1, 1, 0), 0, (0, 1, 0), (0, 1, 1)
    return made


def drifting(rng, device, requests, **given):
    """A step whose spans' means are far from each other, with rows for requests of padding."""
    return make_step(rng, device, requests, padding=7, drift=1.5, **given)


def poisoned(served, made):
    """Means beside the step's caches, of which none is set; one tensor a cache."""
    found = []
    for cache in made.caches:
        key, _ = served.layout.keys_and_values(cache)
        found.append(served._means.of(key, torch.float32).fill_(torch.nan))
    return found


def serve(served, made, requests, row):
    """Serves queries of one of the step's requests, told as requests of their own."""
    table = made.step.block_table[..., [row] * len(requests), :]
    step = step_of(requests, table, table.device)
    query = torch.randn(len(made.query), step.tokens, *made.query.shape[2:]).to(made.query)
    run(served, SimpleNamespace(step=step, query=query, caches=made.caches))


def earlier(served, made):
    """Serves what sets means before the step: the last token of each span."""
    span = span_pages(made.page) * made.page
    for row, (stop, count) in enumerate(made.requests):
        ends = range(span, stop - count + 1, span)
        if ends:
            serve(served, made, [(end, 1) for end in ends], row)


def in_chunks(rng, served, made):
    """Serves all that precedes the step, cut anywhere."""
    for row, (stop, count) in enumerate(made.requests):
        cuts = [0, *np.sort(rng.integers(0, stop - count + 1, 2)), stop - count]
        for start, end in pairwise(cuts):
            if end > start:
                serve(served, made, [(end, end - start)], row)


def check(masks, made, found, softcap=0.0):
    """Holds outputs of all layers against the oracle; tails must matter in some."""
    without, matter = replace(masks, tails=None), False
    for layer in range(masks.layers):
        wanted = expected(masks, made, layer, softcap)
        torch.testing.assert_close(found[layer, : len(wanted)], wanted, rtol=1e-4, atol=1e-4)
        matter |= not torch.allclose(wanted, expected(without, made, layer, softcap), atol=1e-3)
    assert matter


@pytest.mark.parametrize(
    ("requests", "flash", "page", "softcap", "rotates", "stored"),
    [
        (MIXED, False, 16, 0.0, True, None),
        (MIXED, True, 48, 3.0, False, None),
        (MIXED, True, 32, 0.0, True, None),
        (DECODE, False, 48, 3.0, False, FP8),
        (DECODE, True, 16, 0.0, True, None),
        (WIDE, False, 256, 0.0, False, FP8),
    ],
)
def test_layers_equal_the_oracle(
    rng, masks, device, requests, flash, page, softcap, rotates, stored
):
    """Requests that are decoded, in chunks, and that start on cached pages, by either kernel."""
    if device.type == "cuda" and stored and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton converts float8 from compute capability 8.9 on")
    torch.manual_seed(int(rng.integers(2**31)))
    scales = SCALES if stored else (1.0, 1.0)
    served = attention(
        masks, device, flash, rotates=rotates, page=page, softcap=softcap, scales=scales
    )
    made = drifting(rng, device, requests, page=page, stored=stored or torch.float32)
    poisoned(served, made)
    earlier(served, made)
    found = run(served, made)
    if rotates:
        rotate_queries(masks, made)
    for both in made.keys:
        both.unflatten(-1, (2, SIZE)).mul_(torch.tensor(scales)[:, None])
    check(masks, made, found, softcap)


@pytest.mark.parametrize("flash", [False, True])
def test_heads_in_several_groups_equal_the_oracle(rng, masks, device, flash):
    """Means lie in the pool's one tensor, where each head's own block table says."""
    torch.manual_seed(int(rng.integers(2**31)))
    made = grouped(rng, drifting(rng, device, DECODE), group := rng.integers(0, 3, (5, KV_HEADS)))
    served = attention(masks, device, flash, unit=2)
    served.tell(made.offset, torch.from_numpy(group))
    poisoned(served, made)
    earlier(served, made)
    check(masks, made, run(served, made))


def grouped(rng, made, group, unit=2):
    """The same step, its caches in one pool, each head's pages as its group's table says."""
    blocks = made.caches.shape[1]
    place = torch.from_numpy(rng.permutation(group.size)).view(group.shape)
    made.offset = place // unit * (blocks * unit) + place % unit
    shape = (-(-group.size // unit) * blocks * unit, 1, made.page, 2 * SIZE)
    pool, old = torch.full(shape, torch.nan), made.step.block_table.cpu()
    tables = torch.full((group.max() + 1, *old.shape), 2**30, dtype=torch.int32)
    for number in range(len(tables)):
        new = torch.from_numpy(rng.permutation(blocks)).int()
        held = old < blocks
        tables[number][held] = new[old[held].long()]
        for layer, head in np.argwhere(group == number):
            pages = new.long() * unit + made.offset[layer, head]
            pool[pages] = made.caches[layer, :, head, None].cpu()
    device = made.caches.device
    made.step = replace(made.step, block_table=tables.to(device))
    made.caches = pool.to(device).expand(len(group), *shape)
    return made


@pytest.mark.parametrize("page", [16, 48])
def test_means_are_those_of_whole_spans_of_heads_with_tails(rng, masks, device, page):
    """Whatever the chunks, to the last bit; and nothing else is written, not for padding either."""
    torch.manual_seed(int(rng.integers(2**31)))
    requests = ((257, 1), (0, 0), (5, 1), (290, 70), (144, 144), (0, 0))
    made, each = drifting(rng, device, requests, page=page), span_pages(page)
    twice = []
    for before in (lambda *given: earlier(*given), lambda *given: in_chunks(rng, *given)):
        served = attention(masks, device, True, page=page)
        means = poisoned(served, made)
        before(served, made)
        run(served, made)
        twice.append(torch.stack(means).cpu())
    torch.testing.assert_close(*twice, rtol=0, atol=0, equal_nan=True)
    wanted = torch.full_like(twice[0], torch.nan).unflatten(1, (-1, KV_HEADS))
    table, span = made.step.block_table.cpu(), each * page
    for row, (stop, _) in enumerate(made.requests):
        for at in range(stop // span):
            block = table[row, (at + 1) * each - 1]
            mean = made.keys[row][:, at * span : (at + 1) * span].mean(1)  # layers, heads, 2 * size
            for layer, head in np.argwhere(masks.tails):
                wanted[layer, block, head] = mean[layer, head].view(2, SIZE)
    torch.testing.assert_close(twice[0], wanted.flatten(1, 2), equal_nan=True)


def test_a_request_reads_spans_that_another_one_ends_in_its_step(rng, masks, device):
    """By pages that they share: vLLM lets the later one find them as soon as they are scheduled."""
    torch.manual_seed(int(rng.integers(2**31)))
    made = drifting(rng, device, ((391, 1), (384, 300)))
    table = made.step.block_table
    table[1, :12] = table[0, :12]
    made.keys[1] = made.keys[0][:, :384]
    served = attention(masks, device, True)
    poisoned(served, made)
    serve(served, made, [(84, 84)], 1)
    check(masks, made, run(served, made))


@pytest.mark.parametrize("flash", [False, True])
def test_rows_without_unread_spans_keep_their_bits(rng, masks, device, flash):
    """So do heads without a tail."""
    torch.manual_seed(int(rng.integers(2**31)))
    made = drifting(rng, device, ((255, 1), (391, 151)))
    served = attention(masks, device, flash)
    poisoned(served, made)
    earlier(served, made)
    found = run(served, made)
    plain = run(attention(replace(masks, tails=None), device, flash), made)
    # The first span is always read, for its first page.
    few = 1 + 256 - 240
    assert torch.equal(found[:, :few], plain[:, :few])
    assert not torch.equal(found[:, few:-7], plain[:, few:-7])
    for layer, head in np.argwhere(masks.tails == 0):
        own = slice(2 * head, 2 * head + 2)
        assert torch.equal(found[layer, :-7, own], plain[layer, :-7, own])


@contextmanager
def without_waiting(launches):
    with no_sync(), launches:
        yield


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("requests", ["decode", "prefill"])
def test_layers_with_tails_take_two_launches_more(rng, masks, device, flash, requests):
    """One for means, and one for each set of heads with tails; other layers take none."""
    made, counts = drifting(rng, device, STEPS[requests]), []
    for each in (masks, replace(masks, tails=None)):
        served, launches = attention(each, device, flash), Launches()
        poisoned(served, made)
        run(served, made, without_waiting(launches))
        assert [name for name in launches.all if name != "flash"] == launches.triton
        counts.append(launches.all)
    tailed, plain = counts
    sets = sum(
        any(masks.tails[layer] & (masks.modes[layer] == STATIC))
        + any(masks.tails[layer] & (masks.modes[layer] != STATIC))
        for layer in range(masks.layers)
    )
    assert tailed.count("_write_means") == masks.tails.any(axis=1).sum() < masks.layers
    assert tailed.count("_add_tail") == sets
    for name in ("_write_means", "_add_tail"):
        tailed = [each for each in tailed if each != name]
    assert tailed == plain


def test_a_plan_follows_lengths_that_change_on_the_device(rng, masks, device):
    """As those of a CUDA graph do, which is captured where there is a GPU."""
    torch.manual_seed(int(rng.integers(2**31)))
    made = drifting(rng, device, ((512, 1), (500, 1), (640, 1)))
    served = attention(masks, device, False)
    poisoned(served, made)
    earlier(served, made)
    lens, keys = made.step.seq_lens, made.keys
    lens.fill_(1)
    made.step = replace(made.step, max_seq_len=LIMITS.length)
    planned, outputs = served.plan(made.step), torch.empty_like(made.query)

    def step():
        for name, query, cache, output in zip(
            served.layers, made.query, made.caches, outputs, strict=True
        ):
            served.run(planned, name, query, cache, output)

    replay = step
    if device.type == "cuda":
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for _ in range(2):
        stops = [int(rng.integers(300, len(each[0]) + 1)) for each in keys]
        lens.copy_(torch.tensor(stops, dtype=torch.int32))
        made.requests = [(stop, 1) for stop in stops]
        made.keys = [each[:, :stop] for each, stop in zip(keys, stops, strict=True)]
        outputs.fill_(torch.nan)
        replay()
        check(masks, made, outputs.cpu())


def test_means_lie_beside_the_cache_they_are_of(monkeypatch):
    cache, means = torch.zeros(5, 16, 8), SpanMeans()
    first = means.of(cache, torch.float16)
    assert first.shape == (5, 2, 8)
    assert first.dtype == torch.float16
    assert means.of(cache, torch.float16) is first
    assert means.of(torch.zeros(5, 16, 8), torch.float16) is not first
    assert means.of(cache, torch.bfloat16).dtype == torch.bfloat16
    # Another cache where one was.
    assert len(means.of(cache[:3], torch.float16)) == 3
    assert means.of(cache, torch.float32).dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept = means.of(cache, torch.float32)
    on_gpu = SimpleNamespace(shape=cache.shape, is_cuda=True, data_ptr=cache.data_ptr)
    assert means.of(on_gpu, torch.float32) is kept
    means.clear()
    with pytest.raises(RuntimeError, match="captured"):
        means.of(on_gpu, torch.float32)
