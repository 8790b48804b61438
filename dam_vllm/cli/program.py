"""How `dam-vllm` ends: every failure is one line on stderr and an exit code, without traceback."""

import sys
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dam_vllm.bench.client import ClientError
from dam_vllm.options import OptionError
from dam_vllm.server import ServerError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

plain_console = partial(Console, markup=False, emoji=False)
"""Shows text as it stands: "[v2]" and ":key:" in names of files and models are no markup."""

PROGRESS = plain_console(stderr=True)
"""Where progress goes; silent with --quiet."""


def _quiet(wanted: bool) -> None:
    PROGRESS.quiet = wanted


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_quiet, help="No progress, only results and errors."),
]


class Program(TyperGroup):
    """The commands, joined.

    Exit codes: 0; 1 where something was refused or failed; 2 for a command line, option or setting
    that is not allowed; 130 after an interrupt.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs a command line and exits."""
        sys.exit(self._status(*args, **extra | {"standalone_mode": False}))

    def _status(self, *args: Any, **extra: Any) -> int:
        try:
            return super().main(*args, **extra) or 0
        except typer.TyperException as error:  # the command line
            return _fail(error.exit_code, _told(error))
        except OptionError as error:
            return _fail(USAGE, str(error))
        except (ValueError, OSError, ServerError, ClientError) as error:
            return _fail(FAILED, str(error))


def _told(error: typer.TyperException) -> str:
    """What is wrong with a command line, or nothing where help was printed instead."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if not message or context is None:
        return message
    return f"{message.removesuffix('.')} (see {context.command_path} --help)"


def _fail(status: int, message: str) -> int:
    if message:
        typer.echo(f"Error: {message}", err=True)
    return status
