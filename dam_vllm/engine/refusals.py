"""Refusals where a person sees them: from vLLM's first process, as the last line of its output.

What needs no weights is refused before vLLM starts any other process: `LLM(...)` raises the error,
the command `vllm` ends with its message. What only a worker can tell, when it builds layers, vLLM
reports as "Engine core initialization failed"; the worker leaves the message in a file, and the
command repeats it at its end.
"""

import atexit
import functools
import logging
import multiprocessing
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from dam_vllm.engine.checks import admit
from dam_vllm.engine.page import settle_page
from dam_vllm.engine.private import refuse_changed
from dam_vllm.masks.file import MaskFileError
from dam_vllm.masks.fingerprint import FingerprintError
from dam_vllm.options import OptionError

REFUSALS = (OptionError, MaskFileError, FingerprintError)
# Names the file in which workers leave what they refuse.
TOLD = "DAM_VLLM_REFUSAL"
# Marks our wrappers of vLLM's functions, which other plugins may have wrapped too.
OURS = "wrapped_by_dam"


def refuse_early(backend: Any) -> None:
    """Lets every process refuse what it can; idempotent.

    Args:
        backend: the enum member that chooses DAM.
    """
    if multiprocessing.parent_process() is not None:
        _leave_refusals()
    elif not hasattr(EngineArgs.create_engine_config, OURS):
        _check_configurations(backend)


def _check_configurations(backend: Any) -> None:
    stock = EngineArgs.create_engine_config

    @functools.wraps(stock)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if _asks_for(backend, self):
            with suppress(*REFUSALS):  # which `admit` tells
                settle_page(self)
        config = stock(self, *args, **kwargs)
        attention = config.attention_config
        if backend not in (attention.backend, *attention.backend_per_kind.values()):
            return config
        try:
            refuse_changed()
            # Not before: this module needs what was looked up just now.
            from dam_vllm.engine.scheduler import end_chunks_at_pages

            end_chunks_at_pages(config, admit(config))
        except REFUSALS as error:
            if _is_command():
                sys.exit(f"Error: {error}")
            raise
        if _is_command():
            _repeat_refusals()
        return config

    setattr(create_engine_config, OURS, True)
    EngineArgs.create_engine_config = create_engine_config


def _asks_for(backend: Any, arguments: EngineArgs) -> bool:
    """Whether arguments name the backend, before vLLM has checked them."""
    attention = arguments.attention_config
    asked = arguments.attention_backend, attention.backend, *attention.backend_per_kind.values()
    return backend.name in (str(getattr(each, "name", each)).upper() for each in asked)


def _is_command() -> bool:
    """Whether this process is the command `vllm`, not a program that uses the library."""
    return "vllm.entrypoints.cli.main" in sys.modules


def _repeat_refusals() -> None:
    """Ends the command with what a worker refused, where that ended it."""
    if TOLD in os.environ:
        return
    handle, name = tempfile.mkstemp(prefix="dam-vllm-refusal-")
    os.close(handle)
    file, os.environ[TOLD] = Path(name), name
    atexit.register(file.unlink, missing_ok=True)
    earlier = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        earlier(kind, error, trace)
        refused = file.read_text(encoding="utf-8")
        if refused:
            print(f"Error: {refused}", file=sys.stderr)

    sys.excepthook = tell


class _Leave(logging.Handler):
    """Leaves the message of a refusal that vLLM logs."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, REFUSALS):
            Path(os.environ[TOLD]).write_text(str(error), encoding="utf-8")


def _leave_refusals() -> None:
    logger = logging.getLogger("vllm")
    known = any(isinstance(each, _Leave) for each in logger.handlers)
    if TOLD in os.environ and not known:
        logger.addHandler(_Leave())
