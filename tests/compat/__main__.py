"""Holds what we take of vLLM against its releases: `python -m tests.compat 0.32 0.33 ...`.

A release is read from its wheel, fetched by name from the package index and kept under
`.cache/compat`; "installed" is the one that is installed. Nothing of it is run.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.compat.source import Source
from tests.compat.uses import BEHIND_ANY, Checked, behind_any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "compat"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64",
             "manylinux1_x86_64")  # fmt: skip
ROOMS = ("dam_vllm", "tests/engine", "tests/e2e")


def fetch(minor: str) -> Path:
    """Folder of a release's Python files, the latest of a minor version."""
    folder = CACHE / minor
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary=:all:", "--dest", temporary, f"vllm=={minor}.*"]  # fmt: skip
        for platform in PLATFORMS:
            command += ["--platform", platform]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as file:
            names = [each for each in file.namelist() if each.endswith(".py")]
            file.extractall(unpacked, [each for each in names if each.startswith("vllm/")])
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = CACHE / f"{minor}.part"
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was interrupted
        shutil.copytree(unpacked, beside)
        beside.rename(folder)
    return folder


def installed() -> Path:
    """The folder that holds the installed vLLM."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parents[1]


def problems(folder: Path) -> tuple[list[str], int]:
    """What a release lacks, and how many things were looked at."""
    source = Source(folder)
    files = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    checked = [Checked(file, source) for file in files]
    lines = [line for each in checked for line in each.problems] + behind_any(source)
    count = sum(each.count for each in checked) + sum(map(len, BEHIND_ANY.values()))
    return lines, count


def main() -> int:
    """Tells what each release lacks; 1 where any lacks something."""
    failed = 0
    for minor in sys.argv[1:]:
        found, count = problems(installed() if minor == "installed" else fetch(minor))
        print(f"vLLM {minor}: {count} uses looked at, {len(found)} not there")
        print("".join(f"  {line}\n" for line in found), end="")
        failed |= bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main())
