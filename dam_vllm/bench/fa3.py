"""The peer: FlashAttention as vLLM ships it, also where vLLM is not installed."""

import importlib.util
import lzma
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dam_vllm.attention.cuda.flash import Varlen

LIBRARY, INTERFACE, VERSION = "_vllm_fa3_C.abi3.so", "flash_attn_interface.py", 3


@dataclass(frozen=True)
class Flash:
    """A build of FlashAttention.

    Attributes:
        varlen: `flash_attn_varlen_func` of its interface.
        schedule: `get_scheduler_metadata`, what vLLM computes once a step for all layers; None
            for versions that take none.
        origin: where it comes from.
    """

    varlen: Varlen
    schedule: Callable[..., Any] | None
    origin: str


def load(folder: Path | None) -> Flash:
    """FlashAttention 3 of a folder, or that of the installed vLLM.

    Args:
        folder: holds vLLM's library, packed by xz or not, and its interface; or None.

    Raises:
        ImportError: if there is neither, or it does not fit this torch.
    """
    if folder is not None:
        return _packed(folder)
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vLLM is not installed and no --fa3 was given")
    from dam_vllm.bench.on_vllm.fa3 import installed

    function, schedule, version = installed()
    return Flash(
        partial(function, fa_version=version),
        schedule if version == VERSION else None,
        f"FlashAttention {version} of vLLM",
    )


def is_packed(folder: Path) -> bool:
    """Whether a folder holds both files."""
    return (folder / INTERFACE).is_file() and any(
        (folder / name).is_file() for name in (LIBRARY, f"{LIBRARY}.xz")
    )


def _packed(folder: Path) -> Flash:
    try:
        _load_library(folder / LIBRARY)
    except OSError as error:
        raise ImportError(f"{folder / LIBRARY} does not load: {error}") from error
    interface = _module(folder / INTERFACE)
    return Flash(
        partial(interface.flash_attn_varlen_func, fa_version=VERSION),
        interface.get_scheduler_metadata,
        f"FlashAttention {VERSION} of {folder}",
    )


def _load_library(path: Path) -> None:
    if path.is_file():
        torch.ops.load_library(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / path.name
        with lzma.open(path.with_name(f"{path.name}.xz")) as source:
            unpacked.write_bytes(source.read())
        torch.ops.load_library(unpacked)


def _module(path: Path) -> ModuleType:
    """The interface by itself; it finds its kernels in `torch.ops`, not beside it."""
    spec: Any = importlib.util.spec_from_file_location("packed_flash_attn_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
