import subprocess
import sys
from pathlib import Path

import pytest

from dam_vllm.masks.file import load_mask_set

pytestmark = pytest.mark.e2e

COMMAND = str(Path(sys.executable).parent / "dam-vllm")


def test_demo_goes_the_whole_way(tmp_path):
    output = subprocess.run(
        [COMMAND, "demo", "--samples", "2", "--lengths", "600,900", "--output", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert load_mask_set(tmp_path / "masks.safetensors").header.kind == "calibrated"
    assert (tmp_path / "masks.png").stat().st_size > 10_000
    assert output.count("dense ") >= 2
    assert output.count("calibrated") >= 2
    assert str(tmp_path / "masks.png") in output


@pytest.mark.parametrize("lengths", ["100", "4k", "9000", ""])
def test_bad_lengths_are_refused(lengths):
    result = subprocess.run([COMMAND, "demo", "--lengths", lengths], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"Error: --lengths is '{lengths}', must be numbers from 256 to" in result.stderr
