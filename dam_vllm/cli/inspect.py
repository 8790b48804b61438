"""`dam-vllm inspect`: what a mask file holds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dam_vllm.cli.program import plain_console

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from dam_vllm.masks.mask_set import MaskSet

FIT_SHOWN = {"target_error", "target_density", "chosen", "proven", "check"}
FIT_HIDDEN = {"curves", "heads", "texts"}


def inspect(
    file: Annotated[
        str, typer.Argument(help="Mask file, or folder or Hub id that holds dam/masks.safetensors.")
    ],
    length: Annotated[int, typer.Option(min=1, help="Prompt length of the density shown.")] = 8192,
    page: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a KV-cache page (default: those of the fit, else 128)."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the heads' masks to this image (.png), and beside it what the fit could "
            "choose from to NAME-curve, which heads reuse whose pages to NAME-reuse."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the viewer of these masks to this page (.html), data included."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Shows a mask file: layers, density, coverage, parameters and fingerprint."""
    from dam_vllm.masks.file import load_mask_set
    from dam_vllm.masks.fit_report import check_fit
    from dam_vllm.options import PAGE, mask_file

    path = mask_file(file)
    masks = load_mask_set(path)
    fit = masks.header.parameters.get("fit")
    if fit is not None:
        check_fit(fit, path)
    report = _report(masks, length, page or masks.header.fitted_page or PAGE)
    if plot is not None:
        _plot(masks, plot)
    if html is not None:
        _write_page(masks, mask_file(file), html, report)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _plot(masks: "MaskSet", path: Path) -> None:
    from dam_vllm.masks.plots import plot_curve, plot_masks, plot_reuse

    plot_masks(masks, path)
    if masks.anchors is not None:
        plot_reuse(masks, path.with_stem(f"{path.stem}-reuse"))
    if "fit" in masks.header.parameters:
        plot_curve(masks.header.parameters["fit"], path.with_stem(f"{path.stem}-curve"))


def _write_page(masks: "MaskSet", file: Path, path: Path, report: dict[str, Any]) -> None:
    """The viewer that servers have, with the density that is expected."""
    from dam_vllm.endpoint.answers import describe_all, head_masks
    from dam_vllm.endpoint.page import page
    from dam_vllm.files import replacing

    density = [
        {"layer": entry["layer"], "head": head, "density": value}
        for entry in report["layers"]
        for head, value in enumerate(entry.get("density_kv", []))
    ]
    served = {"masks": file.name, "kind": report["kind"], "pcl": masks.pcl, "page": report["page"]}
    data = {
        "served": served | {"layers": [each.model_dump() for each in describe_all(masks)]},
        "note": f"expected for a prompt of {report['length']} tokens",
        "density": density,
        "masks": {f"{each.layer}/{each.head}": each.model_dump() for each in head_masks(masks)},
    }
    with replacing(path) as temporary:
        temporary.write_text(page(data), encoding="utf-8")


def _report(masks: "MaskSet", length: int, page: int) -> dict[str, Any]:
    """All that is shown, as JSON values; what was not measured is None."""
    from dam_vllm.cli.frontier import frontier_rows
    from dam_vllm.masks.density import density

    heads, kv_heads = density(masks, [length], page)
    layers = []
    for layer, kind in enumerate(masks.header.layer_types):
        entry: dict[str, Any] = {"layer": layer, "type": kind}
        if kind == "full":
            entry |= {
                "modes": [_mode(value) for value in masks.modes[layer]],
                "dynamic": _dynamic(masks, layer),
                "reuse": _reuse(masks, layer),
                "tails": [] if masks.tails is None else masks.tails[layer].nonzero()[0].tolist(),
                "columns": masks.columns[layer].sum(axis=1).tolist(),
                "diagonals": masks.diagonals[layer].sum(axis=1).tolist(),
                "density_heads": _numbers(heads[0, layer]),
                "density_kv": _numbers(kv_heads[0, layer]),
                "coverage": _row(masks.coverage, layer),
                "coverage_extended": _row(masks.coverage_extended, layer),
            }
        layers.append(entry)
    report = {**masks.header.model_dump(), "length": length, "page": page, "layers": layers}
    return report | {"frontier": frontier_rows(masks)}


def _dynamic(masks: "MaskSet", layer: int) -> list[dict[str, Any]]:
    """How a layer's dynamic heads choose; budgets in tokens, a share, or attention mass."""
    from dam_vllm.masks.budget import BudgetKind
    from dam_vllm.masks.mask_set import HeadMode

    dynamic, found = masks.dynamic, []
    if dynamic is None:
        return []
    for head in (masks.modes[layer] == HeadMode.DYNAMIC).nonzero()[0].tolist():
        at = (layer, head)
        entry: dict[str, Any] = {"head": head, "channels": int(dynamic.channels[at])}
        entry |= {"kind": BudgetKind(int(dynamic.kinds[at])).name.lower()}
        entry |= {"budget": round(float(dynamic.budgets[at]), 4)}
        found.append(entry | {"floor": int(dynamic.floors[at]), "cap": int(dynamic.caps[at])})
    return found


def _reuse(masks: "MaskSet", layer: int) -> list[dict[str, int]]:
    """Which heads a layer's reusing heads follow."""
    from dam_vllm.masks.mask_set import HeadMode

    heads = (masks.modes[layer] == HeadMode.REUSE).nonzero()[0].tolist()
    anchors = [masks.anchor(layer, head) for head in heads]
    return [
        {"head": head, "anchor_layer": of_layer, "anchor_head": of_head}
        for head, (of_layer, of_head) in zip(heads, anchors, strict=True)
    ]


def _mode(value: int) -> str:
    from dam_vllm.masks.mask_set import HeadMode

    return HeadMode(value).name.lower()


def _row(table: "np.ndarray | None", layer: int) -> list[float | None] | None:
    return None if table is None else _numbers(table[layer])


def _numbers(values: "np.ndarray") -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from dam_vllm.cli.frontier import print_frontier

    console = plain_console()
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
    _print_dynamic(console, report["layers"])
    _print_reuse(console, report["layers"])
    settings = Table(show_header=False, title="parameters")
    for name, value in report["parameters"].items():
        if name != "fit":
            settings.add_row(name, json.dumps(value))
    console.print(settings)
    if "fit" in report["parameters"]:
        _print_fit(console, report["parameters"]["fit"])
    print_frontier(console, report["frontier"])
    console.print(f"fingerprint: {json.dumps(report['fingerprint'])}")
    if report["quality"] is not None:
        console.print("quality:", json.dumps(report["quality"], indent=2))


def _print_dynamic(console: "Console", layers: list[dict[str, Any]]) -> None:
    """A line for each dynamic head, if there are any."""
    from rich.table import Table

    table = Table(title="dynamic heads")
    for name in ("layer", "KV head", "channels"):
        table.add_column(name, justify="right")
    table.add_column("pages chosen")
    for entry in layers:
        for head in entry.get("dynamic", []):
            numbers = (entry["layer"], head["head"], head["channels"])
            table.add_row(*(str(number) for number in numbers), _budget(head))
    if table.row_count:
        console.print(table)


def _print_reuse(console: "Console", layers: list[dict[str, Any]]) -> None:
    """A line for each anchor and each layer with heads that follow it, if there are any."""
    from rich.table import Table

    followers: dict[tuple[int, int, int], list[int]] = {}
    for entry in layers:
        for each in entry.get("reuse", []):
            key = (each["anchor_layer"], each["anchor_head"], entry["layer"])
            followers.setdefault(key, []).append(each["head"])
    table = Table(title="heads that reuse the pages another chose")
    for name in ("anchor's\nlayer", "anchor's\nKV head", "layer"):
        table.add_column(name, justify="right")
    table.add_column("KV heads")
    for key, heads in sorted(followers.items()):
        table.add_row(*(str(number) for number in key), ", ".join(str(head) for head in heads))
    if table.row_count:
        console.print(table)


def _print_fit(console: "Console", fit: dict[str, Any]) -> None:
    """Target, what was reached, and the check; the curve is drawn instead."""
    from rich.table import Table

    table = Table(show_header=False, title="fit of the heads' modes")
    chosen = fit["chosen"]
    for name in ("target_error", "target_density"):
        if fit[name] is not None:
            table.add_row(name, str(fit[name]))
    reached = ", ".join(f"{name} {chosen[name]:.4f}" for name in ("density", "loss", "cost"))
    table.add_row("reached", reached)
    proven = ", ".join(f"{each['density']:.4f} {each['loss']:.4f}" for each in fit["proven"])
    table.add_row("measured", f"density and loss: {proven}; curves: see --plot")
    for name in sorted(fit.keys() - FIT_SHOWN - FIT_HIDDEN):
        table.add_row(name, json.dumps(fit[name]))
    console.print(table)
    if "check" not in fit:  # the choice was made later, without a model
        return
    check = Table(title="check on other texts")
    check.add_column("text / rows")
    for name in ("KL", "same best token"):
        check.add_column(name, justify="right")
    for kind, values in fit["check"].items():
        check.add_row(kind, f"{values['kl']:.5f}", f"{values['top1']:.4f}")
    console.print(check)


def _cells(entry: dict[str, Any]) -> list[str]:
    if entry["type"] != "full":
        return ["left to vLLM", "", "", "", ""]
    modes = {mode: entry["modes"].count(mode) for mode in entry["modes"]}
    told = [f"{count} {mode}" for mode, count in modes.items()]
    if entry["tails"]:
        told.append(f"{len(entry['tails'])} tailed")
    return [
        "\n".join(told),
        f"{_mean(entry['density_heads'])} / {_mean(entry['density_kv'])}",
        f"{_mean(entry['coverage'])} / {_mean(entry['coverage_extended'])}",
        _range(entry["columns"]),
        _range(entry["diagonals"]),
    ]


def _budget(head: dict[str, Any]) -> str:
    from dam_vllm.masks.budget import BUDGETS, BudgetKind

    bounds = f"{head['floor']} to {head['cap']} tokens"
    kind = BUDGETS[BudgetKind[head["kind"].upper()]]
    return f"{kind.words(head['budget'])}, {bounds}"


def _mean(values: list[float | None] | None) -> str:
    measured = [value for value in values or [] if value is not None]
    return f"{sum(measured) / len(measured):.3f}" if measured else "-"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
