"""`dam-vllm eval` on the demo model, over real servers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import dense
from dam_vllm.masks.file import load_mask_set, save_mask_set

pytestmark = pytest.mark.e2e

COMMAND = str(Path(sys.executable).parent / "dam-vllm")
TEXTS = model_dir().parent / "texts.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


def evaluate(folder, *arguments):
    command = [COMMAND, "eval", str(model_dir()), *map(str, arguments)]
    return subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
    ).stdout


@pytest.fixture(scope="module")
def results(folder):
    masks = folder / "full.safetensors"
    save_mask_set(dense(str(model_dir())), masks)
    setting = ["--tasks", "lines,kv", "--lengths", "512", "--samples", "4", "--seed", "3"]
    setting += ["--text", TEXTS, "--windows", "2", "--masks", masks]
    evaluate(folder, *setting, "--json", folder / "first.json", "--write")
    # All is stored, so that no server starts again.
    evaluate(folder, *setting, "--json", folder / "second.json", "--plot", folder / "map.png")
    return [json.loads((folder / name).read_text()) for name in ("first.json", "second.json")]


def test_masks_that_keep_all_answer_as_dense_does(results):
    rows = results[0]["rows"]
    assert [(row["masks"], row["task"]) for row in rows] == [
        (masks, task) for masks in ("dense", "full.safetensors") for task in ("lines", "kv")
    ]
    for row in rows:
        assert row["length"] == 512
        assert row["accuracy"] >= 0.75
        assert row["density"] == 1.0
        assert 0 < row["seconds"] < 60


def test_masks_that_keep_all_agree_with_dense(results):
    stock, full = results[0]["agreement"]
    assert (stock["masks"], full["masks"]) == ("dense", "full.safetensors")
    assert stock["kl"] < 1e-6
    assert full["top1"] > 0.99
    assert full["kl"] < 0.001
    assert full["perplexity"] == pytest.approx(stock["perplexity"], rel=0.01)
    assert full["density"] == 1.0
    assert 2 < stock["perplexity"] < 100


def test_second_run_tells_the_same(results, folder):
    first, second = results
    assert second["rows"] == first["rows"]
    assert second["agreement"] == first["agreement"]
    assert imread(folder / "map.png").std() > 0.05, "one colour"


def test_report_lies_in_the_mask_file(results, folder):
    report = load_mask_set(folder / "full.safetensors").header.quality
    assert report["tasks"]["kv"]["512"]["accuracy"] == results[0]["rows"][3]["accuracy"]
    assert report["agreement"]["512"]["top1"] == results[0]["agreement"][1]["top1"]
