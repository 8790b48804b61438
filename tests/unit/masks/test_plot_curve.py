import pytest
from matplotlib.figure import Figure

from dam_vllm.masks.plots import plot_curve

FIT = {
    "lengths": [2048, 8192],
    "curves": {
        "0.0": [{"density": 1.0, "loss": 0.0}, {"density": 0.5, "loss": 0.1}],
        "1.0": [{"density": 1.0, "loss": 0.0}, {"density": 0.02, "loss": 0.9}],
    },
    "proven": [{"density": 0.5, "loss": 0.2}, {"density": 0.02, "loss": 0.3}],
    "chosen": {"density": 0.5, "loss": 0.2},
}


def test_points_and_choice_are_drawn(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    plot_curve(FIT, tmp_path / "curve.png")
    (axes,) = kept[0].axes
    alone, layers, measured, chosen = (line.get_xydata().tolist() for line in axes.lines)
    assert alone == [[1.0, 0.0], [0.5, 0.1]]
    assert layers == [[1.0, 0.0], [0.02, 0.9]]
    assert measured == [[0.5, 0.2], [0.02, 0.3]]
    assert chosen == [[0.5, 0.2]]
    assert "8192 tokens" in axes.get_xlabel()


def test_an_image_is_written(tmp_path):
    plot_curve(FIT, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_suffix_that_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plot_curve(FIT, tmp_path / "curve.text")
