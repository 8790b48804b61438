"""What the package says of itself: its dependencies, and how it is run."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dam_vllm

ROOT = Path(dam_vllm.__file__).parents[1]
# Not declared as dependencies of every user: vLLM differs by platform, what compiles for CPUs comes
# with it, data sets are an extra.
OPTIONAL = {"vllm", "llvmlite", "datasets"}
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface_hub"}


def imported():
    """Top-level names that the package imports anywhere, lazily too."""
    names = set()
    for file in (ROOT / "dam_vllm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"]}
    third_party = imported() - set(sys.stdlib_module_names) - {"dam_vllm"} - OPTIONAL
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} == declared


def pinned(*names):
    """Versions by name, of some locks."""
    lines = [
        line for name in names for line in (ROOT / "deploy/cpu" / name).read_text().split("\n")
    ]
    pins = [re.match(r"([\w.-]+)==(\S+)", line) for line in lines]
    return {canonicalize_name(each[1]): each[2] for each in pins if each}


@pytest.mark.parametrize(
    ("extras", "locks"),
    [
        (("cpu", "data"), ["requirements.lock"]),
        (("dev",), ["requirements.lock", "development.lock"]),
    ],
)
def test_locks_hold_what_is_declared(extras, locks):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = list(project["dependencies"])
    for extra in extras:
        declared += project["optional-dependencies"][extra]
    versions = pinned(*locks)
    for each in map(Requirement, declared):
        assert each.specifier.contains(versions[canonicalize_name(each.name)]), each


def test_the_package_runs_as_a_module(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "dam_vllm", "--version"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == dam_vllm.__version__
