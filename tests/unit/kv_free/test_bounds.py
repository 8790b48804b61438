"""Sinks and window against what the page tables of the masks really select."""

import dataclasses

import numpy as np
import pytest
import torch

from dam_vllm.engine.kv_free.bounds import Bounds, head_bounds
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.page_tables import PageSelector, page_tables


def bounds_of(heads, layer, head):
    """One head's bounds."""
    sinks, window = int(heads.sinks[layer, head]), int(heads.window[layer, head])
    return Bounds(heads.page, heads.query_block, sinks, window, heads.start)


@pytest.mark.parametrize("page", [16, 32, 48, 128, 160])
@pytest.mark.parametrize("dense_below", [0, 200, 600])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_unread_pages_are_never_selected(random_masks, page, dense_below, share):
    masks = random_masks(pcl=150, share=share)
    heads = head_bounds(masks, page, dense_below)
    assert heads.bounded.all()
    tables = [page_tables(masks, layer, page) for layer in range(masks.layers)]
    selector = PageSelector(tables, dense_below)
    query_blocks = torch.arange(12)
    selected = selector.select(query_blocks, 12 * selector.own)
    for layer, head in np.ndindex(heads.bounded.shape):
        bounds = bounds_of(heads, layer, head)
        for done in range(0, 8 * heads.query_block, 7):
            first, last = bounds.unread(done)
            later = selected[layer, head, done // heads.query_block :]
            assert not later[:, first:last].any()
            if done >= heads.start and first < last:
                assert later[0, last]
                assert later[:, first - 1].any()


def test_a_head_that_reads_nothing_keeps_the_first_page_and_its_own(random_masks):
    heads = head_bounds(random_masks(share=0.0), 32, 0)
    assert bounds_of(heads, 0, 0) == Bounds(page=32, query_block=128, sinks=1, window=0, start=128)
    assert bounds_of(heads, 0, 0).unread(1000) == (1, 28)


def test_nothing_is_freed_where_everything_may_be_read(random_masks):
    heads = head_bounds(random_masks(pcl=150, share=0.0), 32, 600)
    bounds = bounds_of(heads, 0, 0)
    assert heads.start == 640
    assert bounds.unread(639) == (1, 1)
    assert bounds.unread(640) == (1, 20)


def test_only_static_heads_of_covered_layers_are_bounded(random_masks):
    masks = random_masks(layers=5, heads=8, kv_heads=4, dense=True, dynamic=True, reuse=True)
    masks.header.layer_types = ["full"] * 4 + ["sliding"]
    expected = masks.modes == HeadMode.STATIC
    expected[4] = False
    assert expected.any()
    np.testing.assert_array_equal(head_bounds(masks, 32, 0).bounded, expected)


@pytest.mark.parametrize("in_flight", [1, 37, 512])
@pytest.mark.parametrize("start", [0, 128, 1024])
@pytest.mark.parametrize("page", [16, 32, 128])
def test_most_pages_is_what_a_request_holds_at_its_peak(page, start, in_flight):
    bounds = Bounds(page=page, query_block=128, sinks=2, window=3, start=start)
    held = []
    for done in range(3000):
        first, last = bounds.unread(done)
        held.append(-(-(done + in_flight) // page) - (last - first))
    assert max(held) == bounds.most_pages(in_flight)


def test_a_larger_window_frees_less():
    bounds = Bounds(page=32, query_block=128, sinks=1, window=2, start=0)
    first, last = bounds.unread(4000)
    assert dataclasses.replace(bounds, window=5).unread(4000) == (first, last - 3)
    assert dataclasses.replace(bounds, sinks=200).unread(4000) == (200, 200)


def test_a_head_with_a_tail_keeps_its_pages(random_masks):
    """Means of spans lie where their last page does."""
    masks = random_masks(layers=2, heads=8, kv_heads=4, dense=True, dynamic=True, tails=True)
    expected = (masks.modes == HeadMode.STATIC) & (masks.tails == 0)
    masks.tails[0, 2] = 1
    expected[0, 2] = False
    np.testing.assert_array_equal(head_bounds(masks, 32, 0).bounded, expected)
