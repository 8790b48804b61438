import pytest

from dam_vllm.bench.masks import streaming_masks, window_pages
from dam_vllm.masks.pages import density


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
    masks = streaming_masks(2, 1, 32, group=3)
    assert (masks.heads, masks.kv_heads) == (6, 2)
    assert masks.true_mask(0).shape == (6, 33, 33)
