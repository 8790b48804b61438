"""YAML files of settings, options laid over them, and settings written with what they mean."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.settings import (
    MEMORY_TARGET,
    TARGETS,
    Amplification,
    CalibrationConfig,
    FitConfig,
)

WIDTH = 96


def load_config(paths: Sequence[str | Path], overrides: dict[str, Any]) -> CalibrationConfig:
    """Reads YAML files, each laid over those before it, and lays options over them.

    Args:
        paths: the files; none for the defaults.
        overrides: values by field name, those of TARGETS and MEMORY_TARGET for the fit; None
            means not given.

    Returns:
        The validated settings.

    Raises:
        CalibrationError: if a file cannot be read, or for an unknown key or a value that is
            not allowed.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = _laid_over(values, _read(Path(path)))
    given = {key: value for key, value in overrides.items() if value is not None}
    fit = {key: given.pop(key) for key in (*TARGETS, MEMORY_TARGET) if key in given}
    values = _laid_over(values, given | ({"fit": fit} if fit else {}))
    try:
        return CalibrationConfig.model_validate(values)
    except ValidationError as error:
        source = f"{', '.join(map(str, paths))}: " if paths else ""
        problems = "; ".join(_explain(item) for item in error.errors())
        raise CalibrationError(source + problems) from None


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings under others; a target replaces the other kind of target, of which one may stand."""
    kept = {
        key: value
        for key, value in below.items()
        if key not in TARGETS or not above.keys() & set(TARGETS)
    }
    for key, value in above.items():
        inner = below.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            kept[key] = _laid_over(inner, value)
        else:
            kept[key] = value
    return kept


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CalibrationError(f"--config is {str(path)!r}, must be a YAML file that exists")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--config {path} is no YAML file: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CalibrationError(
            f"--config {path} holds a {type(values).__name__}, must hold keys and values"
        )
    return values


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owners: dict[Any, type[BaseModel]] = {"amplification": Amplification, "fit": FitConfig}
        owner = owners[item["loc"][0]] if len(item["loc"]) > 1 else CalibrationConfig
        fields = owner.model_fields
        allowed = ", ".join(field.alias or name for name, field in fields.items())
        return f"unknown key {path!r} (value {item['input']!r}); allowed are {allowed}"
    if item["type"] == "value_error":
        return (f"{path}: " if path else "") + str(item["msg"]).removeprefix("Value error, ")
    return f"{path} is {item['input']!r}: {item['msg']}"


def described(config: CalibrationConfig) -> str:
    """Settings as a YAML file that says above each what it means."""
    return "\n".join(_lines(config, ""))


def _lines(settings: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        comment = f"{indent}# "
        yield from textwrap.wrap(
            field.description or "", WIDTH, initial_indent=comment, subsequent_indent=comment
        )
        key = f"{indent}{field.alias or name}:"
        if isinstance(value, BaseModel):
            yield key
            yield from _lines(value, f"{indent}  ")
        else:
            dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            yield f"{key} {dumped.splitlines()[0]}"
