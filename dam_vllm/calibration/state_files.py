"""Files of an unfinished calibration: whole or not there, and damaged ones named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.files import replacing


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; one already there is replaced whole.

    Args:
        path: the file.
        arrays: by name.
        metadata: text that the file carries.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads arrays and metadata of `write_arrays`.

    Raises:
        CalibrationError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; one already there is replaced whole.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        CalibrationError: if the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"checkpoint file {path} is damaged ({error}): remove {path.parent} to start anew"
    )
