"""Rules of masks, held for whatever shapes hypothesis thinks of."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.mask_set import HeadMode, MaskSet, pack_lower
from dam_vllm.masks.page_tables import PageTables, head_tables, page_tables
from dam_vllm.masks.rule import allowed, token_mask
from dam_vllm.masks.sharding import shards
from tests.conftest import random_mask_set
from tests.fuzz_masks import check_meaning, check_same, held

examples = settings(deadline=None, max_examples=60)

shares = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])


@st.composite
def mask_sets(draw, static=False):
    """Masks of any shape: layers left to vLLM, all modes, a reach beyond the PCL."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    heads, pcl = kv_heads * draw(st.integers(1, 4)), draw(st.integers(1, 150))
    reach = draw(st.none() | st.integers(pcl, pcl + 200))
    dynamic = not static and draw(st.booleans())
    masks = random_mask_set(
        rng, layers, heads, kv_heads, pcl, dynamic=dynamic, head_size=draw(st.integers(2, 9))
    )
    shape = (layers, heads, reach or pcl)
    columns = rng.random(shape) < draw(shares)
    diagonals = rng.random(shape) < draw(shares)
    true_bits = pack_lower(rng.random((layers, heads, pcl, pcl)) < draw(shares))
    modes = masks.modes.copy()
    if draw(st.booleans()):
        modes[rng.random(modes.shape) < 0.3] = HeadMode.DENSE
    types = [draw(st.sampled_from(["full", "full", "sliding", "other"])) for _ in range(layers)]
    for array in (columns, diagonals, true_bits):
        array[[kind != "full" for kind in types]] = 0
    header = masks.header.model_copy(update={"reach": reach, "layer_types": types})
    return replace(
        masks, columns=columns, diagonals=diagonals, true_bits=true_bits, modes=modes, header=header
    )


@st.composite
def measured(draw, masks):
    """The same with what calibration measures, all or some of it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=4)))
    shape = (masks.layers, masks.heads)
    tables = {
        "coverage": rng.random(shape, np.float32),
        "coverage_extended": np.full(shape, np.nan, np.float32),
        "density_heads": rng.random((len(lengths), *shape), np.float32),
        "density_kv": rng.random((len(lengths), *masks.modes.shape), np.float32),
    }
    kept = {name: tables[name] for name in tables if draw(st.booleans())}
    return replace(masks, density_lengths=np.array(lengths, np.int32), **kept)


@examples
@given(mask_sets().flatmap(lambda masks: st.just(masks) | measured(masks)))
def test_saved_masks_come_back(masks: MaskSet):
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / "masks", Path(folder) / "again"
        save_mask_set(masks, path)
        back = load_mask_set(path)
        check_same(held(back), held(masks))
        check_meaning(back)
        save_mask_set(back, again)
        assert again.read_bytes() == path.read_bytes()


def pair(masks, layer, head, i, j):
    """The rule of the paper for one pair, from the true mask and the kept patterns."""
    if i < masks.pcl:
        return masks.true_mask(layer)[head, i, j]
    column = j < masks.reach and masks.columns[layer, head, j]
    return column or (i - j < masks.reach and masks.diagonals[layer, head, i - j])


@examples
@given(mask_sets(), st.data())
def test_extension_beyond_the_pcl(masks, data):
    """Any rows of any chunk are the rule's, pair by pair."""
    layer = data.draw(st.integers(0, masks.layers - 1))
    head = data.draw(st.integers(0, masks.heads - 1))
    start = data.draw(st.integers(0, masks.reach + 50))
    stop = data.draw(st.integers(start + 1, start + 60))
    found = allowed(masks, layer, start, stop)
    assert found.shape == (masks.heads, stop - start, stop)
    for i in data.draw(st.sets(st.integers(start, stop - 1), max_size=3)):
        expected = [pair(masks, layer, head, i, j) for j in range(i + 1)]
        assert found[head, i - start].tolist() == expected + [False] * (stop - 1 - i)


def pages_of_pairs(masks, layer, page, query_block, count):
    """Pages of each query block with a pair that is allowed, bool [heads, blocks, pages]."""
    mask = token_mask(masks, layer, 0, count * query_block)
    return mask.reshape(
        masks.heads, count, query_block, count * query_block // page, page
    ).any(axis=(2, 4))  # fmt: skip


@st.composite
def paged(draw):
    """Static masks, a layer of them, and page and query block sizes, of any multiple."""
    masks, page = draw(mask_sets(static=True)), draw(st.integers(1, 48))
    return masks, draw(st.integers(0, masks.layers - 1)), page, page * draw(st.integers(1, 4))


@examples
@given(paged())
def test_rounding_up_to_pages(case):
    """A query block reads the pages that one of its pairs lies in, the first and its own."""
    masks, layer, page, query_block = case
    count = -(-(masks.reach + 70) // query_block)
    expected = pages_of_pairs(masks, layer, page, query_block, count)
    expected[..., 0] = True
    for block in range(count):
        start, stop = (at * query_block // page for at in (block, block + 1))
        expected[:, block, start:stop] = True
        expected[tables_dense(masks, layer), block, :stop] = True
    tables = head_tables(masks, layer, page, query_block)
    np.testing.assert_array_equal(tables.select(np.arange(count)), expected)


def tables_dense(masks, layer):
    """Query heads that are dense."""
    return np.repeat(masks.modes[layer] == HeadMode.DENSE, masks.heads // masks.kv_heads)


@examples
@given(paged())
def test_kv_heads_read_what_any_of_their_query_heads_reads(case):
    masks, layer, page, query_block = case
    blocks = np.arange(-(-(masks.reach + 70) // query_block))
    apart = head_tables(masks, layer, page, query_block).select(blocks)
    expected = apart.reshape(masks.kv_heads, -1, *apart.shape[1:]).any(axis=1)
    joined = page_tables(masks, layer, page, query_block).select(blocks)
    np.testing.assert_array_equal(joined, expected)


@examples
@given(paged(), st.data())
def test_ranks_hold_every_kv_head(case, data):
    """More ranks than heads share them evenly; fewer hold slices that are the whole."""
    masks, layer, page, query_block = case
    kv_heads = masks.kv_heads
    ranks = data.draw(
        st.sampled_from([n for n in range(1, 21) if not (kv_heads % n and n % kv_heads)])
    )
    held_by = shards(kv_heads, ranks)
    assert len(held_by) == ranks
    whole = page_tables(masks, layer, page, query_block)
    blocks = np.arange(-(-(masks.reach + 70) // query_block))
    copies = max(1, ranks // kv_heads)
    tables = PageTables.joined([s.tables(masks, layer, page, query_block) for s in held_by])
    np.testing.assert_array_equal(
        tables.select(blocks), np.repeat(whole.select(blocks), copies, axis=0)
    )


@examples
@given(mask_sets(), st.integers(1, 20))
def test_ranks_know_their_dynamic_heads(masks, ranks):
    kv_heads = masks.kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        ranks = kv_heads
    for layer in range(masks.layers):
        found = [
            shard.start + head
            for shard in shards(kv_heads, ranks)
            for head in shard.dynamic_heads(masks, layer)
        ]
        dynamic = np.flatnonzero(masks.modes[layer] == HeadMode.DYNAMIC)
        assert found == np.repeat(dynamic, max(1, ranks // kv_heads)).tolist()


@examples
@given(mask_sets(), st.integers(1, 20))
def test_ranks_hold_every_query_head_once(masks, ranks):
    """Also where several share a KV head."""
    if masks.heads % ranks or (masks.kv_heads % ranks and ranks % masks.kv_heads):
        ranks = masks.heads
    each, found = masks.heads // masks.kv_heads, []
    for shard in shards(masks.kv_heads, ranks):
        own = range(masks.heads)[shard.query_heads(masks)]
        assert all(shard.holds(head // each) for head in own)
        assert len(own) == masks.heads // ranks
        found += own
    assert found == list(range(masks.heads))
