"""Joins the commands of `dam-vllm`; each keeps its heavy imports to itself."""

import signal
import sys

import typer

from dam_vllm import __version__
from dam_vllm.cli import masks
from dam_vllm.cli.bench import app as bench
from dam_vllm.cli.calibrate import calibrate
from dam_vllm.cli.demo import demo
from dam_vllm.cli.doctor import doctor
from dam_vllm.cli.eval import ManyMasks, evaluate
from dam_vllm.cli.inspect import inspect
from dam_vllm.cli.program import Program
from dam_vllm.cli.push import push
from dam_vllm.cli.settings import settings

app = typer.Typer(
    cls=Program,
    help="Calibrated sparse attention (DAM) for vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(calibrate)
app.command()(settings)
app.command()(inspect)
app.command()(push)
app.command("eval", cls=ManyMasks)(evaluate)
app.add_typer(masks.app, name="masks")
app.add_typer(bench, name="bench")
app.command()(demo)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point."""
    # As an exception it stops the servers that a command has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
