import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from dam_vllm.calibration.static.build import DENSITY_PAGE
from dam_vllm.cli.main import app
from dam_vllm.masks.density import density
from dam_vllm.masks.file import load_mask_set, save_mask_set
from tests.frontiers import KL, with_frontier
from tests.unit.calibration.conftest import model_folder, texts_file  # noqa: F401 - fixtures
from tests.unit.cli.test_inspect_fit import FIT


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_calibrate_then_inspect(model_folder, texts_file, tmp_path):  # noqa: F811
    file, image = tmp_path / "masks.safetensors", tmp_path / "masks.png"
    settings = tmp_path / "c.yaml"
    settings.write_text("pcl: 32\ntau: 0.1\ntexts: 8\nwindow: 48\n")
    done = run("calibrate", model_folder, "--data", texts_file, "--config", settings,
               "--pcl", 40, "--output", file, "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "PCL 40" in done.output
    shown = run("inspect", file, "--plot", image, "--length", 100)
    assert shown.exit_code == 0, shown.output
    for word in ("density at 100", "coverage", "2 static", "tau", "fingerprint"):
        assert word in shown.output
    assert image.read_bytes().startswith(b"\x89PNG")
    report = json.loads(run("inspect", file, "--json", "--page", 8).output)
    assert (report["pcl"], report["page"], len(report["layers"])) == (40, 8, 3)
    assert report["parameters"]["window"] == 48
    assert len(report["layers"][0]["coverage"]) == 4


@pytest.mark.parametrize("content", [None, b"", b"not a mask file", b"\x08" + bytes(20)])
def test_inspect_refuses_damaged_files(tmp_path, content):
    file = tmp_path / "bad.safetensors"
    if content is not None:
        file.write_bytes(content)
    shown = run("inspect", file)
    assert shown.exit_code == 1
    assert shown.output.startswith("Error: ")
    assert str(file) in shown.output
    assert len(shown.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pcl", 4000, "pcl is 4000, must be at most"),
        ("--dtype", "int8", "--dtype is 'int8', must be one of auto, float32"),
        ("--device", "tpu9", "--device is 'tpu9', must be cpu, cuda"),
        ("--memory-gib", 0, "--memory-gib is 0.0, must be more than 0"),
        ("--field", "body", "--field 'body' is no text in"),
        ("--config", "none.yaml", "--config is 'none.yaml', must be a YAML file"),
    ],
)
def test_calibrate_refuses_bad_options(model_folder, texts_file, tmp_path, option, value, message):  # noqa: F811
    done = run("calibrate", model_folder, "--data", texts_file, "--output", tmp_path / "m",
               option, value)  # fmt: skip
    assert done.exit_code == 2
    assert f"Error: {message}" in done.output
    assert not (tmp_path / "m.partial").exists()


@pytest.mark.parametrize(
    "command", [["calibrate", "--data", "x"], ["masks", "dense"], ["masks", "streaming"]]
)
def test_masks_are_not_written_among_weights(model_folder, command):  # noqa: F811
    done = run(*command, model_folder, "--output", model_folder / "masks.safetensors")
    assert done.exit_code == 2
    assert "where every .safetensors file is read as weights" in done.output
    assert not (model_folder / "masks.safetensors").exists()


@pytest.fixture
def fitted(random_masks, tmp_path):
    """A mask file with a frontier of four choices."""
    file = tmp_path / "fitted.safetensors"
    each = [random_masks(dynamic=True, dense=index == 3) for index in range(4)]
    masks = with_frontier([replace(m, dynamic=each[0].dynamic) for m in each])
    masks.header.parameters["fit"] = FIT
    save_mask_set(masks, file)
    return file


def test_retargeted_masks_are_another_choice_of_the_same_file(fitted, tmp_path):
    output = tmp_path / "other.safetensors"
    done = run("calibrate", "--retarget", fitted, "--target-error", 0.01, "--output", output, "-q")
    assert done.exit_code == 0, done.output
    assert "density 0.3000, KL 0.0100, cost 0.3100" in done.output
    report = json.loads(run("inspect", output, "--json").output)
    assert report["layers"][0]["modes"] == ["dense", "dynamic"]
    assert [row["kl"] for row in report["frontier"]] == pytest.approx(KL)
    assert [row["dense"] for row in report["frontier"]] == [0, 0, 0, 1]
    for shown in (run("inspect", fitted).output, run("inspect", output).output):
        for words in ("frontier", "0.4000", "0.1500"):
            assert words in shown
    assert "check on other texts" not in shown
    masks = load_mask_set(output)
    _, expected = density(masks, masks.density_lengths.tolist(), DENSITY_PAGE)
    np.testing.assert_array_equal(masks.density_kv, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-density", 0.01], "target_density is 0.01: must be at least 0.05"),
        ([], "--retarget needs exactly one of them"),
        (["--target-density", 0.1, "--target-error", 0.1], "needs exactly one of them"),
        (["--target-density", 0.1, "--data", "x"], "--data is 'x', must be left away"),
        (["model", "--target-density", 0.1], "MODEL is 'model', must be left away"),
        (["--config", "a", "--config", "b"], "--config is ['a', 'b'], must be left away"),
        (["--pcl", 64], "--pcl is 64, must be left away"),
        (["--reach", 64], "--reach is 64, must be left away"),
        (["--texts", 9], "--texts is 9, must be left away"),
        (["--batch-size", 2], "--batch-size is 2, must be left away"),
        (["--seed", 0], "--seed is 0, must be left away"),
        (["--field", "text"], "--field is 'text', must be left away"),
        (["--device", "cpu"], "--device is 'cpu', must be left away"),
        (["--dtype", "auto"], "--dtype is 'auto', must be left away"),
        (["--revision", "main"], "--revision is 'main', must be left away"),
        (["--target-kv-memory", 0.5], "--target-kv-memory is 0.5, must be left away"),
        (["--memory-gib", 1], "--memory-gib is 1.0, must be left away"),
    ],
)
def test_retarget_refuses(fitted, tmp_path, arguments, message):
    output = tmp_path / "other.safetensors"
    done = run("calibrate", "--retarget", fitted, "--output", output, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not output.exists()


def test_a_calibration_needs_model_and_data(tmp_path):
    done = run("calibrate", "model", "--output", tmp_path / "masks.safetensors")
    assert done.exit_code == 2
    assert "MODEL is 'model' and --data is None: both must be given" in done.output
