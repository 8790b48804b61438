"""`dam-vllm doctor`: whether this installation can serve, and what to do where it cannot."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from dam_vllm.cli.program import FAILED, PROGRESS, Quiet, plain_console

if TYPE_CHECKING:
    from dam_vllm.diagnosis import Diagnosis


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    quiet: Quiet = False,
) -> None:
    """Checks versions, plugin, platform and kernels; exit code 1 where something is broken."""
    from dam_vllm.diagnosis import diagnose

    with PROGRESS.status("asking vLLM in a child process"):
        found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(FAILED)


def _print(found: "Diagnosis") -> None:
    from rich.table import Table

    from dam_vllm.diagnosis import SHOWN

    console = plain_console()
    table = Table(title="packages")
    for column in ("package", "installed", "tested with", ""):
        table.add_column(column)
    for each in found.packages:
        if each.name in ("dam-vllm", *SHOWN) or not each.fits:
            mark = "ok" if each.fits else "PROBLEM"
            table.add_row(each.name, each.installed or "none", each.tested, mark)
    console.print(table)
    lines = [f"entry point: {'seen' if found.plugin else 'MISSING'}"]
    if found.engine is not None:
        engine = found.engine
        chosen = engine["chosen"] or "no backend of ours"
        lines += [
            f"platform: {engine['platform']} ({engine['device']})",
            f"--attention-backend dam: {chosen}",
        ]
        lines += [f"kernel {name}: {why or 'ok'}" for name, why in engine["kernels"].items()]
        lines += [f"difference from the oracle: {engine['error']} (at most {engine['tolerance']})"]
    lines += [f"PROBLEM: {each.what}\n  -> {each.remedy}" for each in found.problems]
    lines += [] if found.problems else ["no problems"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
