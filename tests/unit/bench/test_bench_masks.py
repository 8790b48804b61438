import numpy as np
import pytest

from dam_vllm.bench.masks import (
    scattered_masks,
    streaming_masks,
    window_pages,
    with_dynamic_heads,
)
from dam_vllm.demo import model_dir
from dam_vllm.masks.density import density
from dam_vllm.masks.mask_set import HeadMode


@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("wanted", [0.12, 0.2, 0.5])
def test_density_is_near_the_wanted_one(page, wanted):
    pages = window_pages(8192, page, wanted)
    found = float(density(streaming_masks(2, pages, page), [8192], page)[1].mean())
    assert found == pytest.approx(wanted, abs=0.02)


def test_extremes_are_the_nearest_there_is():
    assert window_pages(4096, 128, 1e-6) == 0
    pages = window_pages(4096, 128, 1.0)
    assert density(streaming_masks(1, pages, 128), [4096], 128)[1].mean() == 1


def test_group_repeats_the_heads():
    masks = streaming_masks(2, 1, 32, heads_per_kv=3)
    assert (masks.heads, masks.kv_heads) == (6, 2)
    assert masks.columns.shape == masks.diagonals.shape == (1, 6, 33)


def test_the_first_heads_choose_on_top_of_their_window():
    """8 pages more a query block, but for the first ones, which have no more to choose from."""
    static = streaming_masks(4, 1, 32)
    masks = with_dynamic_heads(static, 1, 64, 16, 256)
    assert masks.modes.tolist() == [[HeadMode.DYNAMIC, *[HeadMode.STATIC] * 3]]
    before, after = (density(each, [4096], 32)[1][0, 0] for each in (static, masks))
    np.testing.assert_allclose(after[1:], before[1:])
    causal = 128 * 129 / 2
    # The query block of a dynamic head is a page, that of a static one 128 tokens.
    assert after[0] * causal == pytest.approx(sum(min(own, 3 + 8) for own in range(1, 129)))
    assert with_dynamic_heads(static, 0, 64, 16, 256).dynamic is None


@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("wanted", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("count", [0, 3])
def test_scattered_pages_have_the_wanted_density(page, wanted, count):
    masks = scattered_masks(str(model_dir()), 8321, page, wanted, count, 32, 16)
    found = density(masks, [8321], page)[1][0]
    assert found[:, count:].mean() == pytest.approx(wanted, abs=0.006)
    # Both kinds of heads read about as much.
    assert np.abs(found - wanted).max() < 0.05
    chosen = masks.modes == HeadMode.DYNAMIC
    assert chosen[:, :count].all()
    assert not chosen[:, count:].any()


def test_scattered_pages_differ_by_head_and_reach_far():
    masks = scattered_masks(str(model_dir()), 8321, 128, 0.2, 0, 32, 16)
    kept = masks.diagonals.reshape(4, 4, 2, -1)
    np.testing.assert_array_equal(kept[:, :, 0], kept[:, :, 1])  # query heads of a KV head
    heads = [tuple(np.flatnonzero(each)) for each in kept[:, :, 0].reshape(16, -1)]
    assert len(set(heads)) == 16
    assert all(distance % 128 == 0 for each in heads for distance in each)
    assert np.mean([max(each) for each in heads]) > 6000
