"""The card of a mask file on the Hub: what its README.md says."""

import json
import re
from typing import Any

import yaml

from dam_vllm.hub import is_hub_id
from dam_vllm.masks.mask_set import HeadMode, MaskSet

LONG = ("fit", "long_windows")
"""Parameters that `dam-vllm inspect` shows better."""


def mask_card(masks: MaskSet, repository: str) -> str:
    """Describes masks in Markdown with the Hub's metadata.

    Args:
        masks: the masks; their header is untrusted text.
        repository: Hub id that the card is for.

    Returns:
        The card: how to serve, layers and modes, density, parameters and quality report.
    """
    header = masks.header
    name = header.model.rstrip("/").rsplit("/", 1)[-1]
    metadata: dict[str, Any] = {"library_name": "dam-vllm", "tags": ["dam-vllm", "vllm"]}
    model = name
    if is_hub_id(header.model):
        metadata["base_model"] = model = header.model
    options = json.dumps({"dam": {"masks": repository}})
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# DAM masks for {_code(model)}",
        "Calibrated sparse attention for vLLM, by the plugin dam-vllm. They fit that model alone:"
        " its fingerprint is checked before serving.",
        f"    vllm serve {_plain(model)} --attention-backend dam --additional-config '{options}'",
        _table("masks", [("kind", header.kind), ("PCL", masks.pcl), *_modes(masks)]),
        _table("density (pages read over pages that dense attention reads)", _densities(masks)),
        _table("parameters", list(_parameters(header.parameters))),
    ]
    if header.quality is not None:
        report = json.dumps(header.quality, indent=1).replace("`", "'")
        parts.append(f"## Quality report\n\n```json\n{report}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _modes(masks: MaskSet) -> list[tuple[str, object]]:
    full = [kind == "full" for kind in masks.header.layer_types]
    counts = [(mode.name.lower(), int((masks.modes[full] == mode).sum())) for mode in HeadMode]
    found: list[tuple[str, object]] = [("layers masked", f"{sum(full)} of {masks.layers}")]
    return found + [(f"{name} KV heads", count) for name, count in counts if count]


def _densities(masks: MaskSet) -> list[tuple[str, object]]:
    if masks.density_lengths is None or masks.density_kv is None:
        return []
    full = [kind == "full" for kind in masks.header.layer_types]
    rows = zip(masks.density_lengths.tolist(), masks.density_kv, strict=True)
    return [(f"{length} tokens", f"{table[full].mean():.3f}") for length, table in rows]


def _parameters(parameters: dict[str, Any]) -> list[tuple[str, object]]:
    return [(name, json.dumps(value)) for name, value in parameters.items() if name not in LONG]


def _table(title: str, rows: list[tuple[str, object]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title[0].upper()}{title[1:]}", "", "| | |", "|---|---|"]
    lines += [f"| {_code(name)} | {_code(str(value))} |" for name, value in rows]
    return "\n".join(lines)


def _code(text: str) -> str:
    """Text as code, which no Markdown or HTML in it leaves."""
    harmless = re.sub(r"[`|\n]", " ", text)
    return f"`{harmless}`"


def _plain(text: str) -> str:
    """A model's name for a command line."""
    return re.sub(r"[^\w./-]", "_", text)
