"""The mask file: one safetensors file, its header JSON in the metadata. No pickle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dam_vllm.files import replacing
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.mask_set import Header, MaskSet

FORMAT = "dam-masks/2"
BIT_ARRAYS = ("columns", "diagonals")
REQUIRED = ("columns", "diagonals", "true_bits", "modes")
OPTIONAL = ("coverage", "coverage_extended", "density_lengths", "density_heads", "density_kv")
DTYPES: dict[str, type[np.generic]] = {
    "columns": np.uint8,
    "diagonals": np.uint8,
    "true_bits": np.uint8,
    "modes": np.uint8,
    "coverage": np.float32,
    "coverage_extended": np.float32,
    "density_lengths": np.int32,
    "density_heads": np.float32,
    "density_kv": np.float32,
}
DYNAMIC = "dynamic."
DYNAMIC_DTYPES: dict[str, type[np.generic]] = {
    "rotations": np.float32,
    "channels": np.int32,
    "kinds": np.uint8,
    "budgets": np.float32,
    "floors": np.int32,
    "caps": np.int32,
    "expected": np.float32,
}
DTYPES |= {DYNAMIC + name: dtype for name, dtype in DYNAMIC_DTYPES.items()}


class MaskFileError(ValueError):
    """A mask file that is missing, damaged or of another format."""


def save_mask_set(masks: MaskSet, path: str | Path) -> None:
    """Writes a mask file; a file already there is replaced only by a whole one.

    Args:
        masks: what to write.
        path: the file; its folder is made if need be.
    """
    arrays = {name: getattr(masks, name) for name in REQUIRED + OPTIONAL}
    if masks.dynamic is not None:
        arrays |= {DYNAMIC + name: array for name, array in vars(masks.dynamic).items()}
    packed = {
        name: np.packbits(array, axis=-1) if name in BIT_ARRAYS else np.ascontiguousarray(array)
        for name, array in arrays.items()
        if array is not None
    }
    metadata = {"format": FORMAT, "header": masks.header.model_dump_json()}
    with replacing(Path(path)) as temporary:
        save_file(packed, temporary, metadata=metadata)


def load_mask_set(path: str | Path) -> MaskSet:
    """Reads a mask file.

    Args:
        path: the file.

    Returns:
        The mask set, checked for shape and dtype.

    Raises:
        MaskFileError: if the file is missing, damaged, or no mask file of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise MaskFileError(f"mask file {path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MaskFileError(f"mask file {path} is damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise MaskFileError(
            f"{path} is no mask file: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    try:
        return _mask_set(arrays, Header.model_validate(json.loads(metadata["header"])))
    except (KeyError, ValueError, ValidationError) as error:
        raise MaskFileError(f"mask file {path} is damaged: {error}") from error


def _mask_set(arrays: dict[str, np.ndarray], header: Header) -> MaskSet:
    for name in REQUIRED:
        if name not in arrays:
            raise ValueError(f"array {name!r} is missing")
    for name, array in arrays.items():
        if name not in DTYPES:
            raise ValueError(f"array {name!r} is unknown")
        if array.dtype != DTYPES[name]:
            raise ValueError(f"array {name!r} is {array.dtype}, expected {DTYPES[name].__name__}")
    reach = header.reach or header.pcl
    for name in BIT_ARRAYS:
        if arrays[name].shape[-1] != (reach + 7) // 8:
            raise ValueError(f"array {name!r} does not hold {reach} bits a row")
        arrays[name] = np.unpackbits(arrays[name], axis=-1, count=reach).view(bool)
    return MaskSet(header=header, dynamic=_dynamic(arrays), **arrays)


def _dynamic(arrays: dict[str, np.ndarray]) -> Dynamic | None:
    """Takes the dynamic heads' arrays out, where there are any."""
    own: dict[str, Any] = {
        name: arrays.pop(DYNAMIC + name) for name in DYNAMIC_DTYPES if DYNAMIC + name in arrays
    }
    if not own:
        return None
    for name in DYNAMIC_DTYPES:
        if name not in own:
            raise ValueError(f"array {DYNAMIC + name!r} is missing")
    return Dynamic(**own)
