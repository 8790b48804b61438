import numpy as np
import pytest

from dam_vllm.masks import plots
from dam_vllm.masks.plots import plot_end, plot_masks, shares
from dam_vllm.masks.rule import token_mask


def by_definition(masks, layer, side, cells):
    """Share of the attended pairs of each cell, from the whole token mask."""
    end = plot_end(masks)
    seen = np.zeros((masks.heads, end, cells * side))
    seen[:, :, :end] = token_mask(masks, layer, 0, end)
    rows = [seen[:, start : start + side].mean(axis=1) for start in range(0, end, side)]
    return np.stack(rows, axis=1).reshape(masks.heads, cells, cells, side).mean(axis=-1)


@pytest.mark.parametrize(("pcl", "reach", "end"), [(31, None, 62), (31, 50, 62), (31, 150, 150)])
@pytest.mark.parametrize("max_cells", [8, 128])
def test_shares_equal_the_definition(reaching_masks, monkeypatch, pcl, reach, end, max_cells):
    monkeypatch.setattr(plots, "MAX_CELLS", max_cells)
    monkeypatch.setattr(plots, "MAX_ROWS", 99)
    masks = reaching_masks(reach, pcl=pcl, share=0.1, true_share=0.2)
    assert plot_end(masks) == end
    side = -(-end // max_cells)
    expected = by_definition(masks, 1, side, -(-end // side))
    np.testing.assert_allclose(shares(masks, 1), expected, rtol=1e-5)


def test_sampled_rows_keep_columns_exactly(reaching_masks, monkeypatch):
    monkeypatch.setattr(plots, "MAX_CELLS", 10)
    monkeypatch.setattr(plots, "MAX_ROWS", 4)
    masks = reaching_masks(200, pcl=20, share=0.1)
    masks.diagonals[:] = False
    found = shares(masks, 0)
    kept = masks.columns[0].copy()
    kept[:, 0] = True  # every row sees the first token
    below = np.tri(10, k=-1, dtype=bool)
    expected = np.repeat(kept.reshape(masks.heads, 1, 10, 20).mean(axis=-1), 10, axis=1)
    np.testing.assert_allclose(found[:, 1:][:, below[1:]], expected[:, 1:][:, below[1:]], rtol=1e-5)


def test_an_image_is_written(reaching_masks, tmp_path):
    plot_masks(reaching_masks(300, layers=1, heads=2, kv_heads=1), tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
