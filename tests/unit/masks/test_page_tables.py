import numpy as np
import pytest

from dam_vllm.attention.oracle import page_mask
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.density import density
from dam_vllm.masks.page_tables import PageSelector, page_tables, query_block_size


def pages_by_definition(masks, layer, length, page, dense_below=0):
    """Pages that are read per (query head, query block, page), from the naive page mask."""
    query_block = query_block_size(page)
    total = -(-length // query_block) * query_block
    mask = page_mask(masks, layer, 0, total, page, dense_below)
    return mask.reshape(masks.heads, total // query_block, query_block, total // page, page).any(
        axis=(2, 4)
    )


@pytest.mark.parametrize(
    ("page", "query_block"), [(16, 128), (32, 128), (48, 144), (128, 128), (256, 256)]
)
def test_query_block_is_whole_pages(page, query_block):
    assert query_block_size(page) == query_block


@pytest.mark.parametrize("page", [16, 32, 48, 128, 256])
@pytest.mark.parametrize("pcl", [1, 70, 128, 301])
def test_tables_select_what_the_definition_reads(random_masks, page, pcl):
    masks = random_masks(pcl=pcl, share=0.01, dense=True)
    expected = pages_by_definition(masks, 0, 1200, page)
    heads_per_kv = masks.heads // masks.kv_heads
    query_blocks = np.arange(expected.shape[1])
    selected = page_tables(masks, 0, page).select(query_blocks)
    np.testing.assert_array_equal(np.repeat(selected, heads_per_kv, axis=0), expected)


@pytest.mark.parametrize("page", [16, 48, 128])
@pytest.mark.parametrize("pcl", [70, 301])
@pytest.mark.parametrize("reach", [310, 700])
def test_tables_follow_patterns_beyond_the_pcl(reaching_masks, page, pcl, reach):
    masks = reaching_masks(reach, pcl=pcl, share=0.004)
    expected = pages_by_definition(masks, 0, 1200, page)
    selected = page_tables(masks, 0, page).select(np.arange(expected.shape[1]))
    heads_per_kv = masks.heads // masks.kv_heads
    np.testing.assert_array_equal(np.repeat(selected, heads_per_kv, axis=0), expected)


@pytest.mark.parametrize("page", [16, 48, 128])
def test_single_diagonals_reach_exactly_their_pages(random_masks, page):
    """Beyond the PCL, one diagonal at a time: none of the pages at either end is missed."""
    masks = random_masks(layers=1, heads=1, kv_heads=1, pcl=300, share=0.0)
    query_block = query_block_size(page)
    start = 6 * query_block
    for kept in range(300):
        masks.diagonals[:] = False
        masks.diagonals[0, 0, kept] = True
        expected = np.zeros(7 * query_block // page, dtype=bool)
        expected[[0, *range(start // page, len(expected))]] = True
        expected[(np.arange(start, start + query_block) - kept) // page] = True
        found = page_tables(masks, 0, page).select(np.array([6]))[0, 0]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dense_below", [0, 100, 256])
def test_density_counts_pages(random_masks, dense_below):
    masks = random_masks(share=0.04)
    heads, kv_heads = density(masks, [1024, 333], 32, dense_below)
    read = pages_by_definition(masks, 1, 1024, 32, dense_below)
    causal = np.tri(8, dtype=bool).repeat(4, axis=1)
    heads_per_kv = masks.heads // masks.kv_heads
    expected = (read & causal).sum(axis=(1, 2)) / causal.sum()
    np.testing.assert_allclose(np.repeat(kv_heads[0, 1], heads_per_kv), expected, rtol=1e-6)
    assert (heads <= np.repeat(kv_heads, heads_per_kv, axis=2) + 1e-6).all()
    assert (heads[0] < np.repeat(kv_heads, heads_per_kv, axis=2)[0]).any()


def test_layers_left_to_vllm_count_as_dense(random_masks):
    masks = random_masks()
    masks.header.layer_types[1] = "sliding"
    heads, kv_heads = density(masks, [999], 32)
    assert (heads[0, 1] == 1).all()
    assert (kv_heads[0, 1] == 1).all()
    assert (kv_heads[0, 0] < 1).all()


def test_dense_heads_read_everything(random_masks):
    masks = random_masks(dense=True)
    _, kv_heads = density(masks, [2048], 32)
    assert kv_heads[0, 0, 0] == 1
    assert kv_heads[0, 0, 1] < 1


def test_choosing_heads_read_static_pages_and_what_is_expected(random_masks):
    """A reusing head's number of chosen pages is its anchor's."""
    masks = random_masks(layers=2, share=0.002, dynamic=True, reuse=True)
    masks.anchors[1, 0] = (0, 1)
    dynamic, page, length = masks.dynamic, 32, 999
    dynamic.kinds[:], dynamic.floors[:], dynamic.caps[:] = BudgetKind.TOP_K, 0, 9999
    dynamic.budgets[0, 1], dynamic.budgets[1, 1] = 5 * page, 2 * page
    heads, kv_heads = density(masks, [length], page, dense_below=128)
    causal = np.arange(-(-length // page)) + 1
    for (layer, head), chosen in {(0, 1): 5, (1, 1): 2, (1, 0): 5}.items():
        static = page_tables(masks, layer, page, page).select(causal - 1)[head].sum(axis=1)
        read = np.where(causal <= 128 // page, causal, np.minimum(static + chosen, causal))
        expected = read.sum() / causal.sum()
        assert kv_heads[0, layer, head] == pytest.approx(expected)
        np.testing.assert_allclose(heads[0, layer].reshape(2, 2)[head], expected, rtol=1e-6)


@pytest.mark.parametrize(("dense_below", "blocks"), [(0, 0), (1, 4), (128, 4), (129, 8)])
def test_the_dense_start_is_whole_query_blocks_of_static_heads(random_masks, dense_below, blocks):
    """Also where query blocks are a page, as those of dynamic heads."""
    tables = page_tables(random_masks(), 0, 32, query_block=32)
    assert PageSelector([tables], dense_below).dense_blocks == blocks
    read = tables.select(np.arange(9), dense_below)
    assert read[:, :blocks].sum(axis=2).tolist() == [list(range(1, blocks + 1))] * len(read)
