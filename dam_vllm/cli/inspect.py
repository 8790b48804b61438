"""`dam-vllm inspect`: what a mask file holds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from dam_vllm.masks.mask_set import MaskSet


def inspect(
    file: Annotated[Path, typer.Argument(help="Mask file (.safetensors).")],
    length: Annotated[int, typer.Option(min=1, help="Prompt length of the density shown.")] = 8192,
    page: Annotated[int, typer.Option(min=1, help="Tokens a KV-cache page.")] = 16,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the heads' masks to this image (.png).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Shows a mask file: layers, density, coverage, parameters and fingerprint."""
    from dam_vllm.masks.file import load_mask_set

    try:
        masks = load_mask_set(file)
        report = _report(masks, length, page)
        if plot is not None:
            from dam_vllm.masks.plot import plot_masks

            plot_masks(masks, plot)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _report(masks: "MaskSet", length: int, page: int) -> dict[str, Any]:
    """All that is shown, as JSON values; what was not measured is None."""
    from dam_vllm.masks.pages import density

    heads, kv_heads = density(masks, [length], page)
    layers = []
    for layer, kind in enumerate(masks.header.layer_types):
        entry: dict[str, Any] = {"layer": layer, "type": kind}
        if kind == "full":
            entry |= {
                "modes": [_mode(value) for value in masks.modes[layer]],
                "columns": masks.columns[layer].sum(axis=1).tolist(),
                "diagonals": masks.diagonals[layer].sum(axis=1).tolist(),
                "density_heads": _numbers(heads[0, layer]),
                "density_kv": _numbers(kv_heads[0, layer]),
                "coverage": _row(masks.coverage, layer),
                "coverage_extended": _row(masks.coverage_extended, layer),
            }
        layers.append(entry)
    return {**masks.header.model_dump(), "length": length, "page": page, "layers": layers}


def _mode(value: int) -> str:
    from dam_vllm.masks.mask_set import HeadMode

    return HeadMode(value).name.lower()


def _row(table: "np.ndarray | None", layer: int) -> list[float | None] | None:
    return None if table is None else _numbers(table[layer])


def _numbers(values: "np.ndarray") -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report['kind']} masks of {report['model']}, PCL {report['pcl']}")
    table.add_column("layer", justify="right")
    for name in ("type", "KV heads"):
        table.add_column(name)
    table.add_column(f"density at {report['length']}\nquery / KV head", justify="right")
    table.add_column("coverage\n< / >= PCL", justify="right")
    table.add_column("columns\na head", justify="right")
    table.add_column("diagonals\na head", justify="right")
    for entry in report["layers"]:
        table.add_row(str(entry["layer"]), entry["type"], *_cells(entry))
    console.print(table)
    settings = Table(show_header=False, title="parameters")
    for name, value in report["parameters"].items():
        settings.add_row(name, json.dumps(value))
    console.print(settings)
    console.print(f"fingerprint: {json.dumps(report['fingerprint'])}")
    if report["quality"] is not None:
        console.print("quality:", json.dumps(report["quality"], indent=2))


def _cells(entry: dict[str, Any]) -> list[str]:
    if entry["type"] != "full":
        return ["left to vLLM", "", "", "", ""]
    modes = {mode: entry["modes"].count(mode) for mode in entry["modes"]}
    return [
        ", ".join(f"{count} {mode}" for mode, count in modes.items()),
        f"{_mean(entry['density_heads'])} / {_mean(entry['density_kv'])}",
        f"{_mean(entry['coverage'])} / {_mean(entry['coverage_extended'])}",
        _range(entry["columns"]),
        _range(entry["diagonals"]),
    ]


def _mean(values: list[float | None] | None) -> str:
    measured = [value for value in values or [] if value is not None]
    return f"{sum(measured) / len(measured):.3f}" if measured else "-"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
