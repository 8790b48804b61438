import numpy as np
import pytest
import torch

from dam_vllm.calibration.static.patterns import diagonal_sums, match, true_mask


def naive_match(mask, mu, min_support):
    heads, pcl, _ = mask.shape
    columns, diagonals = np.zeros((2, heads, pcl), dtype=bool)
    for head in range(heads):
        for k in range(pcl):
            column = [mask[head, i, k] for i in range(k, pcl)]
            diagonal = [mask[head, i, i - k] for i in range(k, pcl)]
            enough = len(column) >= min_support
            columns[head, k] = enough and sum(column) / len(column) >= mu
            diagonals[head, k] = enough and sum(diagonal) / len(diagonal) >= mu
    return columns, diagonals


@pytest.mark.parametrize("pcl", [1, 2, 7, 31, 64])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_match_equals_a_naive_loop(pcl, share):
    rng = np.random.default_rng(pcl)
    mask = np.tril(rng.random((3, pcl, pcl)) < share)
    found = match(torch.from_numpy(mask), 0.8, 1)
    columns, diagonals = naive_match(mask, 0.8, 1)
    np.testing.assert_array_equal(found.columns.numpy(), columns)
    np.testing.assert_array_equal(found.diagonals.numpy(), diagonals)


def test_diagonal_sums():
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    assert diagonal_sums(mask).tolist() == [[3, 2, 0]]


def test_planted_patterns_are_found_exactly():
    rng = np.random.default_rng(0)
    pcl, columns, diagonals = 101, [0, 3, 40], [0, 1, 17]
    amplified = rng.random((2, pcl, pcl)).astype(np.float32) * 0.35  # noise, a seventh above 0.3
    rows = np.arange(pcl)
    for column in columns:
        amplified[1, column:, column] = 0.5
    for diagonal in diagonals:
        amplified[1, rows[diagonal:], rows[diagonal:] - diagonal] = 0.5
    found = match(true_mask(torch.from_numpy(amplified), 0.3), 0.8, pcl // 8)
    assert found.columns[1].nonzero().flatten().tolist() == columns
    assert found.diagonals[1].nonzero().flatten().tolist() == diagonals
    assert not found.columns[0].any()
    assert not found.diagonals[0].any()


def test_minimum_support_removes_chance_patterns_at_the_end():
    mask = torch.from_numpy(np.tril(np.random.default_rng(1).random((8, 96, 96)) < 0.3))
    without, supported = match(mask, 0.8, 1), match(mask, 0.8, 12)
    for kept, left in (
        (without.columns, supported.columns),
        (without.diagonals, supported.diagonals),
    ):
        assert kept[:, -12:].any(), "noise must match short patterns by chance"
        assert not kept[:, :-30].any()
        assert not left.any()


def test_true_mask_holds_the_threshold_and_no_future():
    amplified = torch.tensor([[[0.3, 1.0], [0.29, 0.31]]])
    assert true_mask(amplified, 0.3).tolist() == [[[True, False], [False, True]]]
