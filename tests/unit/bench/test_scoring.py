import pytest

from dam_vllm.bench.masks import dynamic_masks
from dam_vllm.bench.scoring import CAP_PAGES, TOP_P, shares, with_top_p
from dam_vllm.masks.budget import TopP


def test_shares_are_medians_over_rounds_and_add_up():
    seconds = {
        "dense": [10.0, 20.0, 40.0],
        "rotate": [1.0, 2.0, 4.0],
        "gather": [0.5, 1.0, 2.0],
        "product": [2.0, 4.0, 8.0],
        "select": [4.0, 7.0, 16.0],
        "whole": [5.0, 5.0, 40.0],
        "tailed": [6.0, 8.0, 42.0],
    }
    row = shares(seconds)
    assert row["dense_ms"] == 20e3
    assert row["dam_ms"] == 5e3
    assert row["choose_over_dense"] == pytest.approx(0.15)
    assert row["all_over_dense"] == pytest.approx(0.5)
    assert row["rotate_over_dense"] == pytest.approx(0.1)
    assert row["tail_over_dense"] == pytest.approx(0.1)
    assert row["speedup"] == 2.0


def test_top_p_goes_as_far_as_the_fit_allows():
    masks = with_top_p(dynamic_masks(2, 4, 64, 16, 256), 32)
    assert masks.dynamic.budget(0, 1, 32) == TopP(pytest.approx(TOP_P), 0, CAP_PAGES)
