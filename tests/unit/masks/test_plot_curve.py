import pytest
from matplotlib import pyplot as plt

from dam_vllm.masks.plot_curve import plot_curve

FIT = {
    "lengths": [2048, 8192],
    "curve": [{"density": d, "loss": e} for d, e in ((0.5, 0.1), (1.0, 0.0), (0.02, 0.9))],
    "chosen": {"density": 0.5, "loss": 0.1},
}


def test_points_and_choice_are_drawn(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_curve(FIT, tmp_path / "curve.png")
    monkeypatch.undo()
    (axes,) = kept[0].axes
    curve, chosen = axes.lines
    assert curve.get_xydata().tolist() == [[0.02, 0.9], [0.5, 0.1], [1.0, 0.0]]
    assert chosen.get_xydata().tolist() == [[0.5, 0.1]]
    assert "8192 tokens" in axes.get_xlabel()
    plt.close(kept[0])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_suffix_that_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plot_curve(FIT, tmp_path / "curve.text")
