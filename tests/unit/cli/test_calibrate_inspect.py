import json

import pytest
import typer
from typer.testing import CliRunner

from dam_vllm.cli.calibrate import calibrate
from dam_vllm.cli.inspect import inspect
from tests.unit.calibration.conftest import model_folder, texts_file  # noqa: F401 - fixtures

app = typer.Typer()
app.command()(calibrate)
app.command()(inspect)


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
    assert shown.exit_code == 2
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
