"""Streaming masks of a wanted density."""

import numpy as np
import pytest

from dam_vllm.evaluation.equal_density import SINKS, equal_window, window_density, window_masks
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.extension import token_mask
from dam_vllm.masks.file import load_mask_set, save_mask_set
from tests.unit.evaluation.conftest import MODEL


def counted(window, length, page, dense_below):
    """Density by going through queries: pages of the tile's selection over causal ones."""
    tile = 128
    read = dense = 0
    for query in range(length):
        start = query // tile * tile
        stop = min(start + tile, length)
        pages = range(-(-stop // page))
        if start < dense_below:
            read += len(pages)
        else:
            read += sum(
                p == 0 or (p + 1) * page > start or (p + 1) * page - 1 > start - window
                for p in pages
            )
        dense += len(pages)
    return read / dense


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize(("length", "dense_below"), [(777, 0), (1024, 0), (1024, 512)])
def test_density_is_that_of_the_pages_read(page, length, dense_below):
    for window in (1, 33, 200, 700):
        found = window_density(MODEL, window, length, page, dense_below)
        assert found == pytest.approx(counted(window, length, page, dense_below))


@pytest.mark.parametrize("wanted", [0.2, 0.31, 0.5, 0.77, 0.999])
def test_window_is_the_shortest_that_is_dense_enough(wanted):
    length, page = 2000, 32
    window = equal_window(MODEL, wanted, length, page, 0)
    assert window_density(MODEL, window, length, page, 0) >= wanted - 1e-3
    if window > 1:
        assert window_density(MODEL, window - 1, length, page, 0) < wanted - 1e-3


def test_finds_its_own_density_again():
    density = window_density(MODEL, 300, 1000, 32, 0)
    window = equal_window(MODEL, density, 1000, 32, 0)
    assert window_density(MODEL, window, 1000, 32, 0) == density


@pytest.mark.parametrize("window", [1, SINKS, 5, 150])
def test_masks_are_those_of_the_baseline(window, tmp_path):
    masks, baseline = window_masks(MODEL, window), streaming(MODEL, SINKS, window)
    save_mask_set(masks, tmp_path / "masks")
    masks = load_mask_set(tmp_path / "masks")
    for layer in range(masks.layers):
        np.testing.assert_array_equal(
            token_mask(masks, layer, 0, 400), token_mask(baseline, layer, 0, 400)
        )


def test_file_does_not_grow_with_the_square(tmp_path):
    save_mask_set(window_masks(MODEL, 20_000), tmp_path / "masks")
    assert (tmp_path / "masks").stat().st_size < 2**20
