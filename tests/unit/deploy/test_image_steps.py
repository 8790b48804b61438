"""The steps of deploy/cpu/Dockerfile, done one by one in a clean folder instead of an image.

Packages of the lock that this environment holds count as installed, unless DAM_WHOLE_IMAGE is set
(`make image-steps`). Left out are steps of the second stage that need an image's system.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.unit.deploy.test_deploy import IMAGES, ROOT, instructions

pytestmark = pytest.mark.slow

VENV = "opt/dam"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


class Steps:
    """A folder that stands for an image's root.

    Attributes:
        root: the folder.
        place: the working directory.
        environment: what ENV has set, in the folder's paths.
    """

    def __init__(self, root):
        self.root = self.place = root
        self.environment = {"PATH": os.environ["PATH"]}

    def inside(self, text):
        """Text with the image's paths in the folder."""
        for path in ("/opt/dam", "/data", "/src"):
            text = text.replace(path, f"{self.root}{path}")
        return text

    def do(self, name, argument, building):
        """Does one instruction."""
        if name == "WORKDIR":
            self.place = Path(self.inside(argument))
            self.place.mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            for each in shlex.split(argument):
                key, value = each.split("=", 1)
                value = self.inside(value).replace("$PATH", self.environment["PATH"])
                self.environment[key] = value
        elif name == "COPY" and not argument.startswith("--from"):
            *sources, target = argument.split()
            self._copy(sources, self.place / self.inside(target))
        elif name == "RUN" and building:
            # The image's Python is this one's; its wheels come from wherever pip finds them here.
            shell = f'python() {{ {sys._base_executable} "$@"; }}\n{self.inside(argument)}'
            clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
            done = subprocess.run(
                ["bash", "-ec", shell], cwd=self.place, env=clean, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    @staticmethod
    def _copy(sources, target):
        for source in sources:
            origin = ROOT / source
            if origin.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(origin, target, ignore=ignored, dirs_exist_ok=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, target)

    def run(self, *command):
        """Runs a command as the image would, nothing of this environment on its path."""
        environment = self.environment | {"OMP_NUM_THREADS": "1"}
        program = shutil.which(command[0], path=environment["PATH"])
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.place, env=environment, capture_output=True, text=True,
        )  # fmt: skip


def hold_packages(root):
    """Lets the image's environment see this one's packages, all but pip, which it has itself."""
    held, packages = root / "held", root / VENV / "lib" / PYTHON / "site-packages"
    held.mkdir()
    packages.mkdir(parents=True)
    for each in Path(sysconfig.get_path("purelib")).iterdir():
        if each.name.split("-")[0] != "pip":
            (held / each.name).symlink_to(each)
    (packages / "held.pth").write_text(str(held))


def test_the_images_steps_give_a_sound_installation(tmp_path):
    steps, stage = Steps(tmp_path), 0
    if not os.environ.get("DAM_WHOLE_IMAGE"):
        hold_packages(tmp_path)
    for name, *argument in instructions(IMAGES[0]):
        stage += name == "FROM"
        steps.do(name, " ".join(argument), building=stage == 1)
    # Packages that count as installed bring no commands along.
    vllm = steps.run("python", "-m", "vllm.entrypoints.cli.main", "--version")
    assert "0.32.0" in vllm.stdout, vllm.stderr
    where = steps.run("python", "-c", "import dam_vllm; print(dam_vllm.__file__)").stdout
    assert where.startswith(str(tmp_path / VENV))
    doctor = steps.run("dam-vllm", "doctor", "--json", "--quiet")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert json.loads(doctor.stdout)["problems"] == []
    assert (tmp_path / VENV / "configs/balanced.yaml").is_file()
    # The default of deploy/compose.yaml.
    demo = tmp_path / VENV / "lib" / PYTHON / "site-packages/dam_vllm/demo/model"
    assert (demo / "dam/masks.safetensors").is_file()
