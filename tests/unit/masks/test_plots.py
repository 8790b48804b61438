import numpy as np
import pytest

from dam_vllm.masks import pictures
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.pictures import plot_end, shares
from dam_vllm.masks.plots import plot_curve, plot_masks, plot_reuse
from dam_vllm.masks.rule import token_mask

FIT = {
    "lengths": [2048, 8192],
    "curves": {
        "0.0": [{"density": 1.0, "loss": 0.0}, {"density": 0.5, "loss": 0.1}],
        "1.0": [{"density": 1.0, "loss": 0.0}, {"density": 0.02, "loss": 0.9}],
    },
    "proven": [{"density": 0.5, "loss": 0.2}, {"density": 0.02, "loss": 0.3}],
    "chosen": {"density": 0.5, "loss": 0.2},
}


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
    monkeypatch.setattr(pictures, "MAX_CELLS", max_cells)
    monkeypatch.setattr(pictures, "MAX_ROWS", 99)
    masks = reaching_masks(reach, pcl=pcl, share=0.1, true_share=0.2)
    assert plot_end(masks) == end
    side = -(-end // max_cells)
    expected = by_definition(masks, 1, side, -(-end // side))
    np.testing.assert_allclose(shares(masks, 1), expected, rtol=1e-5)


def test_sampled_rows_keep_columns_exactly(reaching_masks, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_CELLS", 10)
    monkeypatch.setattr(pictures, "MAX_ROWS", 4)
    masks = reaching_masks(200, pcl=20, share=0.1)
    masks.diagonals[:] = False
    found = shares(masks, 0)
    kept = masks.columns[0].copy()
    kept[:, 0] = True  # every row sees the first token
    below = np.tri(10, k=-1, dtype=bool)
    expected = np.repeat(kept.reshape(masks.heads, 1, 10, 20).mean(axis=-1), 10, axis=1)
    np.testing.assert_allclose(found[:, 1:][:, below[1:]], expected[:, 1:][:, below[1:]], rtol=1e-5)


def test_masks_of_covered_layers_are_drawn(reaching_masks, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(pictures, "MAX_CELLS", 9)  # cells of 10 x 10 pairs, partly attended
    masks = reaching_masks(90, layers=3, heads=2, kv_heads=1, pcl=40, share=0.1)
    masks.header.layer_types[1] = "sliding"
    plot_masks(masks, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    grid = np.array(drawn[0].axes).reshape(2, masks.heads)
    for row, layer in zip(grid, (0, 2), strict=True):
        for axes, image in zip(row, shares(masks, layer), strict=True):
            (shown,), (line,) = axes.images, axes.lines
            np.testing.assert_allclose(shown.get_array(), np.sqrt(image))
            assert shown.get_clim() == (0, 1)  # the same darkness says the same in every head
            assert tuple(shown.get_extent()) == (0, 90, 90, 0)
            assert line.get_xydata().tolist() == [[0, 40], [40, 40]]
        assert row[0].get_ylabel() == f"layer {layer}"
    assert [axes.get_title() for axes in grid[0]] == ["head 0", "head 1"]
    assert drawn[0].get_suptitle() == "Attended pairs up to 90 tokens (line: PCL 40)"
    assert drawn[0].get_supxlabel() == "key position"
    assert drawn[0].get_supylabel() == "query position"


def test_points_and_choice_of_a_fit_are_drawn(tmp_path, drawn):
    plot_curve(FIT, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "predicted, trust in layers 0.0": [[1.0, 0.0], [0.5, 0.1]],
        "predicted, trust in layers 1.0": [[1.0, 0.0], [0.02, 0.9]],
        "measured": [[0.5, 0.2], [0.02, 0.3]],
        "taken": [[0.5, 0.2]],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert axes.get_title() == "taken: density 0.500, loss 0.200"
    assert axes.get_xlabel() == "density at 8192 tokens"
    assert axes.get_ylabel() == "KL of the next token (nats)"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_arrows_lead_from_anchors_to_followers(random_masks, tmp_path, drawn):
    masks = random_masks(layers=3, heads=8, kv_heads=4, dense=True, dynamic=True, reuse=True)
    plot_reuse(masks, tmp_path / "reuse.png")
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    found = {
        (each.xy[::-1], each.xyann[::-1]) for each in axes.texts if hasattr(each, "arrow_patch")
    }
    followers = [tuple(each) for each in np.argwhere(masks.modes == HeadMode.REUSE).tolist()]
    assert len(followers) == 4
    assert found == {(each, tuple(masks.anchors[each].tolist())) for each in followers}
    names = {each.get_position()[::-1]: each.get_text() for each in axes.texts if each.get_text()}
    assert names == {each: "{}.{}".format(*masks.anchors[each]) for each in followers}
    squares = {
        each.get_label(): {tuple(place) for place in each.get_offsets()[:, ::-1].tolist()}
        for each in axes.collections
    }
    assert squares == {
        mode.name.lower(): {tuple(each) for each in np.argwhere(masks.modes == mode).tolist()}
        for mode in HeadMode
    }


def test_a_suffix_that_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plot_curve(FIT, tmp_path / "curve.text")
