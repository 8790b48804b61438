import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from dam_vllm.demo import model_dir
from dam_vllm.masks.file import load_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import MASKS_IN_MODEL

pytestmark = pytest.mark.e2e

COMMAND = str(Path(sys.executable).parent / "dam-vllm")


def test_demo_goes_the_whole_way(tmp_path):
    output = subprocess.run(
        [COMMAND, "demo", "--samples", "2", "--lengths", "600,900", "--output", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    static = load_mask_set(tmp_path / "static.safetensors")
    assert static.header.kind == "calibrated"
    assert (static.modes == HeadMode.STATIC).all()
    assert "fit" not in static.header.parameters
    for name in ("static", "fitted"):
        assert imread(tmp_path / f"{name}.png").std() > 0.05, "one colour"
        assert str(tmp_path / f"{name}.png") in output
    for name in ("dense ", "static (paper)", "fitted "):
        assert output.count(name) >= 2


def test_shipped_masks_are_fitted():
    """What serving finds beside the demo model: with dynamic heads, sparse enough, a frontier."""
    masks = load_mask_set(model_dir() / MASKS_IN_MODEL)
    assert masks.header.fingerprint == fingerprint(str(model_dir()))
    assert (masks.modes == HeadMode.DYNAMIC).any()
    chosen = masks.header.parameters["fit"]["chosen"]
    assert chosen["density"] <= 0.1
    assert chosen["loss"] < 0.015
    assert masks.frontier is not None


@pytest.mark.parametrize("lengths", ["100", "4k", "9000", ""])
def test_bad_lengths_are_refused(lengths):
    result = subprocess.run([COMMAND, "demo", "--lengths", lengths], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"Error: --lengths is '{lengths}', must be numbers from 256 to" in result.stderr
