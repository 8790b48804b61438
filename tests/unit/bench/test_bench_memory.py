import numpy as np
import pytest

from dam_vllm.bench.checks import file_option, image_option
from dam_vllm.bench.masks import streaming_masks
from dam_vllm.bench.memory import bounded_masks, plot_held, total
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import OptionError


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_share_of_bounded_heads(share):
    masks = bounded_masks(streaming_masks(8, 2, 32), share)
    assert (masks.modes == HeadMode.STATIC).mean() == share
    assert (masks.modes[masks.modes != HeadMode.STATIC] == HeadMode.DENSE).all()
    np.testing.assert_array_equal(
        masks.modes, bounded_masks(streaming_masks(8, 2, 32), share).modes
    )


def test_every_engine_is_counted(tmp_path):
    assert total(None) == 15
    assert total(tmp_path) == 17


def test_plot_of_pages_held(tmp_path):
    curves = {"a model, dense": [[0, 0], [100, 2**20]], "a model, half": [[0, 0], [100, 2**19]]}
    plot_held(curves, tmp_path / "held.png")
    assert (tmp_path / "held.png").stat().st_size > 5000


def test_paths_are_checked(tmp_path):
    file_option(None, "--masks")
    image_option(tmp_path / "a.png", "--plot")
    with pytest.raises(OptionError, match="--masks is"):
        file_option(tmp_path / "none", "--masks")
    for name in ("a.text", "none/a.png"):
        with pytest.raises(OptionError, match="--plot is"):
            image_option(tmp_path / name, "--plot")
