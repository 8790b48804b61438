import numpy as np
import pytest
import torch

from dam_vllm.attention.cpu.plan import VirtualPages, build_plan
from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.attention.query_blocks import cut_query_blocks
from dam_vllm.masks.page_tables import PageSelector, page_tables
from dam_vllm.masks.tails import span_pages


def selector_of(masks, page, dense_below=0):
    tables = [page_tables(masks, layer, page) for layer in range(masks.layers)]
    return PageSelector(tables, dense_below)


@pytest.mark.parametrize("page", [16, 32, 48, 128])
@pytest.mark.parametrize("dense_below", [0, 200])
def test_selection_is_the_definition(random_masks, page, dense_below):
    masks = random_masks(pcl=150, share=0.004, dense=True)
    selector = selector_of(masks, page, dense_below)
    query_blocks = torch.tensor([9, 0, 3, 1, 3])
    pages = 10 * selector.own
    selected = selector.select(query_blocks, pages)
    heads_per_kv = masks.heads // masks.kv_heads
    for layer in range(masks.layers):
        for row, query_block in enumerate(query_blocks.tolist()):
            stop = (query_block + 1) * selector.query_block
            mask = page_mask(
                masks, layer, query_block * selector.query_block, stop, page, dense_below
            )
            expected = mask.any(axis=1).reshape(masks.heads, -1, page).any(axis=2)
            found = selected[layer, :, row].repeat_interleave(heads_per_kv, 0).numpy()
            np.testing.assert_array_equal(found[:, : stop // page], expected)
            assert not found[:, stop // page :].any()


def test_query_blocks_are_cut_at_absolute_positions():
    starts, lens = torch.tensor([0, 1, 301, 305], dtype=torch.int32), torch.tensor([77, 300, 258])
    query_blocks = cut_query_blocks(starts, lens, 128)
    assert query_blocks.tokens == 305
    assert query_blocks.request.tolist() == [0, 1, 1, 1, 2, 2]
    assert query_blocks.index.tolist() == [0, 0, 1, 2, 1, 2]
    assert query_blocks.row.tolist() == [0, 1, 129, 257, 301, 303]
    assert query_blocks.stop.tolist() == [77, 128, 256, 300, 256, 258]


class Batch:
    """Random requests with a permuted paged cache; pages of nobody are poisoned."""

    def __init__(self, rng, masks, page, requests):
        torch.manual_seed(int(rng.integers(2**31)))
        self.page, self.size = page, 24
        self.requests = requests
        self.queries = [torch.randn(new, masks.heads, self.size) for _, new in requests]
        self.keys = [torch.randn(stop, masks.kv_heads, self.size) for stop, _ in requests]
        self.values = [torch.randn(stop, masks.kv_heads, self.size) for stop, _ in requests]
        counts = [-(-stop // page) for stop, _ in requests]
        blocks = sum(counts) + 5
        order = torch.from_numpy(rng.permutation(blocks))
        self.cache = torch.full((blocks, masks.kv_heads, page, 2 * self.size), torch.nan)
        self.block_table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
        for row, (stop, _) in enumerate(requests):
            pages, order = order[: counts[row]], order[counts[row] :]
            self.block_table[row, : counts[row]] = pages
            token = torch.arange(stop)
            both = torch.cat([self.keys[row], self.values[row]], dim=-1)
            self.cache[pages[token // page], :, token % page] = both
        self.starts = torch.tensor([0, *np.cumsum([new for _, new in requests])]).int()
        self.lens = torch.tensor([stop for stop, _ in requests]).int()


def run(plan, layer, batch, kv_heads):
    """Runs a layer's virtual sequences one by one, as a paged kernel would."""
    query = torch.cat(batch.queries)
    tokens, heads, size = query.shape
    grouped = query.view(tokens, kv_heads, heads // kv_heads, size)
    by_head = grouped.transpose(0, 1).reshape(-1, heads // kv_heads, size)
    pages = batch.cache.view(-1, 1, batch.page, 2 * size)
    result = torch.full_like(by_head, torch.nan)
    starts = plan.query_start_loc.tolist()
    for row, length in enumerate(plan.seq_lens[layer].tolist()):
        first, last = starts[row : row + 2]
        table = plan.block_table[layer, row, : -(-length // batch.page)].long()
        both = pages[table].permute(0, 2, 1, 3).reshape(-1, 1, 2 * size)[:length]
        key, value = both.split(size, dim=-1)
        new = last - first
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        result[first:last] = masked_attention(
            by_head[first:last], key, value, mask.expand(heads // kv_heads, -1, -1), 0.3
        )
    return result.view(kv_heads, tokens, -1, size).transpose(0, 1).reshape(tokens, heads, size)


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("dense_below", [0, 130])
def test_plan_computes_masked_attention(rng, random_masks, page, dense_below):
    """Chunks that start and end anywhere, single decode tokens, and short requests."""
    masks = random_masks(layers=2, heads=6, kv_heads=3, pcl=150, share=0.01, dense=True)
    batch = Batch(rng, masks, page, [(777, 411), (300, 1), (129, 129), (5, 5), (640, 2), (1, 1)])
    query_blocks = cut_query_blocks(batch.starts, batch.lens, selector_of(masks, page).query_block)
    where = VirtualPages.of_layers(batch.block_table, masks.layers, masks.kv_heads)
    tails = np.zeros((masks.layers, masks.kv_heads), bool)
    plan = build_plan(selector_of(masks, page, dense_below), query_blocks, where, tails)
    assert plan.block_table.dtype == plan.seq_lens.dtype == torch.int32
    for layer in range(masks.layers):
        result = run(plan, layer, batch, masks.kv_heads)
        for row, (stop, new) in enumerate(batch.requests):
            mask = torch.from_numpy(page_mask(masks, layer, stop - new, stop, page, dense_below))
            expected = masked_attention(
                batch.queries[row], batch.keys[row], batch.values[row], mask, 0.3
            )
            found = result[batch.starts[row] : batch.starts[row + 1]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_may_lie_in_several_block_tables(rng, random_masks):
    """Every id is its head's: the page of its group's table, its place in the block."""
    masks, page, pages = random_masks(pcl=150, share=0.001, tails=True), 32, 12
    query_blocks = cut_query_blocks(torch.tensor([0, 300, 301]), torch.tensor([300, 380]), 128)
    shape, tails = (masks.layers, masks.kv_heads), masks.tails.astype(bool)
    logical = torch.arange(2 * pages, dtype=torch.int32).view(1, 2, pages)
    zeros = torch.zeros(shape, dtype=torch.int64)
    selector = selector_of(masks, page)
    plain = build_plan(selector, query_blocks, VirtualPages(logical, zeros, zeros, 1), tails)
    blocks = torch.from_numpy(rng.integers(0, 99, (3, 2, pages))).int()
    group = torch.from_numpy(rng.integers(0, 3, shape))
    offset = torch.from_numpy(rng.integers(0, 500, shape))
    where = VirtualPages(blocks, group, offset, 5)
    found = build_plan(selector, query_blocks, where, tails)

    def ids(layer, row, index):
        head = row // len(query_blocks.index)
        each = blocks[group[layer, head]].flatten()[index.long()] * 5 + offset[layer, head]
        return each.tolist()

    for layer, row in np.ndindex(*found.seq_lens.shape):
        count = -(-int(found.seq_lens[layer, row]) // page)
        index = plain.block_table[layer, row, :count]
        assert found.block_table[layer, row, :count].tolist() == ids(layer, row, index)
    for layer, (mine, logical) in enumerate(zip(found.unread, plain.unread, strict=True)):
        assert (mine is None) == (logical is None)
        if mine is not None:
            assert torch.equal(mine.sequences, logical.sequences)
            for at, count in enumerate(logical.counts.tolist()):
                expected = ids(layer, int(mine.sequences[at]), logical.table[at, :count])
                assert mine.table[at, : mine.counts[at]].tolist() == expected
    heads = torch.tensor([1])
    tables = where.take(1, heads).tables()
    assert tables.dtype == torch.int32
    assert torch.equal(tables[0, 0], blocks[group[1, 1]] * 5 + offset[1, 1])


@pytest.mark.parametrize("page", [16, 48, 160])
@pytest.mark.parametrize("dense_below", [0, 300])
def test_unread_spans_are_the_definition(rng, random_masks, page, dense_below):
    masks = random_masks(layers=3, heads=6, kv_heads=3, share=0.001, dense=True, tails=True)
    selector = selector_of(masks, page, dense_below)
    starts, stops = torch.tensor([0, 1, 700, 960]), torch.tensor([811, 1203, 260])
    query_blocks = cut_query_blocks(starts, stops, selector.query_block)
    pages = -(-1203 // page)
    logical = torch.arange(3 * pages, dtype=torch.int32).view(1, 3, pages)
    zeros = torch.zeros(masks.layers, masks.kv_heads, dtype=torch.int64)
    where = VirtualPages(logical, zeros, zeros, 1)
    plan = build_plan(selector, query_blocks, where, masks.tails.astype(bool))
    each, count, some = span_pages(page), len(query_blocks.index), 0
    for layer in range(masks.layers):
        told, unread = {}, plan.unread[layer]
        if unread is not None:
            for at, sequence in enumerate(unread.sequences.tolist()):
                told[sequence] = unread.table[at, : unread.counts[at]].tolist()
        for head, block in np.ndindex(masks.kv_heads, count):
            row = head * count + block
            length = int(plan.seq_lens[layer, row])
            request = int(query_blocks.request[block])
            read = plan.block_table[layer, row, : -(-length // page)] - request * pages
            first = int(query_blocks.index[block]) * selector.own
            expected = [
                request * pages + (span + 1) * each - 1
                for span in range(first // each)
                if not set(read.tolist()) & set(range(span * each, (span + 1) * each))
            ]
            assert told.pop(row, []) == (expected if masks.tails[layer, head] else [])
            some += len(expected)
        assert not told
    assert some
