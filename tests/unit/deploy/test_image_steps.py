"""The steps of deploy/cpu/Dockerfile, done one by one in a clean folder instead of an image.

Packages of the lock that this environment holds count as installed, unless DAM_WHOLE_IMAGE is set
(`make image-steps`), which also serves. Left out are steps that need an image's system.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

from tests.unit.deploy.test_deploy import COMPOSE, IMAGES, ROOT, instructions

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

    def start(self, *command, **streams):
        """Starts a command as the image would, nothing of this environment on its path."""
        environment = self.environment | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        program = shutil.which(command[0], path=environment["PATH"])
        return subprocess.Popen(
            [program, *command[1:]], cwd=self.place, env=environment, text=True, **streams
        )

    def run(self, *command):
        """Exit code, output and errors of a command."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, error = process.communicate()
        return process.returncode, out, error


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
    steps, stage, whole = Steps(tmp_path), 0, bool(os.environ.get("DAM_WHOLE_IMAGE"))
    if not whole:
        hold_packages(tmp_path)
    for name, *argument in instructions(IMAGES[0]):
        stage += name == "FROM"
        steps.do(name, " ".join(argument), building=stage == 1)
    code, where, _ = steps.run("python", "-c", "import dam_vllm; print(dam_vllm.__file__)")
    assert (code, where.startswith(str(tmp_path / VENV))) == (0, True)
    code, found, error = steps.run("dam-vllm", "doctor", "--json", "--quiet")
    assert code == 0, found + error
    assert json.loads(found)["problems"] == []
    assert (tmp_path / VENV / "configs/balanced.yaml").is_file()
    if whole:  # packages that count as installed bring no commands along, as `vllm`
        serve_and_ask_for_health(steps)


def serve_and_ask_for_health(steps):
    """Starts the server as compose.yaml does, and runs the health check until it is well."""
    image = dict(instructions(IMAGES[0]))
    service = yaml.safe_load(COMPOSE[0].read_text())["services"]["vllm"]
    model = re.search(r":-(.*)\}", service["command"][0])[1]
    entry = json.loads(image["ENTRYPOINT"])
    check = json.loads(image["HEALTHCHECK"].split("CMD", 1)[1])
    assert steps.run(*check)[0] != 0
    server = steps.start(*entry, steps.inside(model), *service["command"][1:])
    try:
        while steps.run(*check)[0] != 0:
            assert server.poll() is None
            time.sleep(1)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
