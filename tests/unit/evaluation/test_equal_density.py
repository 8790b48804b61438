"""Streaming masks of a wanted density."""

import pytest

from dam_vllm.evaluation.equal_density import equal_window, window_density
from tests.unit.evaluation.conftest import MODEL


def counted(window, length, page, dense_below):
    """Density by going through queries: pages of the query block's selection over causal ones."""
    query_block = 128
    read = dense = 0
    for query in range(length):
        start = query // query_block * query_block
        stop = min(start + query_block, length)
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
