from pathlib import Path
from subprocess import CompletedProcess

import pytest

from dam_vllm.bench import memory
from dam_vllm.bench.checks import file_option, image_option
from dam_vllm.bench.masks import streaming_masks
from dam_vllm.bench.memory import bounded_masks
from dam_vllm.demo import model_dir
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import OptionError
from dam_vllm.server import ServerError


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_share_of_bounded_heads(share):
    masks = bounded_masks(streaming_masks(8, 2, 32), share)
    assert (masks.modes == HeadMode.STATIC).mean() == share
    assert (masks.modes[masks.modes != HeadMode.STATIC] == HeadMode.DENSE).all()


@pytest.mark.parametrize("masks", [None, model_dir() / "dam/masks.safetensors"])
def test_every_engine_is_counted(monkeypatch, masks):
    """As many steps of progress, and engines, as were announced."""
    started, steps = [], []

    def run(case, dam, *args, **setup):
        started.append(case)
        held = [[0, 2**20], [100, 2**21]]
        return {"capacity": 2.0, "held": held, "requests_per_second": 1.0, "seconds": 1.0}

    monkeypatch.setattr(memory.Case, "run", run)
    memory.measure(masks, None, lambda: steps.append(1))
    assert len(started) == len(steps) == memory.total(masks)


def test_an_engine_that_fails_is_one_line(monkeypatch, tmp_path):
    said = "INFO a\n" * 2000 + "ValueError: why\n"
    done = CompletedProcess([], 1, "said before\n", said)
    monkeypatch.setattr(memory.subprocess, "run", lambda *given, **also: done)
    case = memory.Case("a", tmp_path, tmp_path / "masks", 0.5, 64, 32, 1024, True)
    with pytest.raises(ServerError, match=r"^vLLM ended: ValueError: why \(its whole") as error:
        case.run(None)
    (line,) = str(error.value).splitlines()
    assert Path(line.split("output: ")[1].removesuffix(")")).read_text() == "said before\n" + said


def test_plot_of_pages_held(tmp_path, drawn):
    curves = {"a model, dense": [[0, 0], [100, 2**20]], "a model, half": [[0, 0], [100, 2**19]]}
    memory.plot_held(curves, tmp_path / "held.png")
    (axes,) = drawn[-1].axes
    assert axes.get_title() == "a model"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens of the request", "pages held (MiB)")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {"dense": [[0, 0], [100, 1]], "half": [[0, 0], [100, 0.5]]}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "half"]


def test_paths_are_checked(tmp_path):
    file_option(None, "--masks")
    image_option(tmp_path / "a.png", "--plot")
    with pytest.raises(OptionError, match="--masks is"):
        file_option(tmp_path / "none", "--masks")
    for name in ("a.text", "none/a.png"):
        with pytest.raises(OptionError, match="--plot is"):
            image_option(tmp_path / name, "--plot")
