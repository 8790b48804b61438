import pytest
from matplotlib import pyplot as plt

from dam_vllm.masks.plot_curve import plot_curve

FIT = {
    "lengths": [2048, 8192],
    "curve": [
        {"density": 1.0, "cost": 1.0, "loss": 0.0},
        {"density": 0.5, "cost": 0.6, "loss": 0.1},
        {"density": 0.02, "cost": 0.3, "loss": 0.9},
    ],
    "chosen": {"density": 0.5, "cost": 0.6, "loss": 0.1},
}


def test_points_and_choice_are_drawn(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_curve(FIT, tmp_path / "curve.png")
    monkeypatch.undo()
    (axes,) = kept[0].axes
    density, cost, chosen = axes.lines
    assert density.get_xydata().tolist() == [[1.0, 0.0], [0.5, 0.1], [0.02, 0.9]]
    assert cost.get_xydata().tolist() == [[1.0, 0.0], [0.6, 0.1], [0.3, 0.9]]
    assert chosen.get_xydata().tolist() == [[0.5, 0.1]]
    assert "8192 tokens" in axes.get_xlabel()
    plt.close(kept[0])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_suffix_that_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plot_curve(FIT, tmp_path / "curve.text")
