"""`dam-vllm settings`: what a calibration can be told, and what some files tell it."""

from pathlib import Path
from typing import Annotated

import typer


def settings(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="YAML files of settings, each laid over those before it."),
    ] = None,
) -> None:
    """Prints the settings of a calibration as commented YAML: the defaults, or those of files.

    The settings of a fit are shown where a file has a target for it.
    """
    from dam_vllm.calibration.settings_file import described, load_config

    typer.echo(described(load_config(files or [], {})))
