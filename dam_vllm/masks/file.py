"""The mask file: one safetensors file, its header JSON in the metadata. No pickle.

A file is untrusted. Sizes are checked before anything is allocated (`tensor_file`), then the digest
of header and arrays, then what each array means (`MaskSet.check_values`).
"""

import hashlib
import json
import reprlib
import zlib
from collections.abc import Collection, Iterable, Mapping
from io import BufferedReader
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from dam_vllm.files import replacing
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.frontier_arrays import Frontier, inflate
from dam_vllm.masks.mask_set import Header, MaskSet, lower_bytes
from dam_vllm.masks.ranges import refuse_padding
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.tensor_file import (
    NAMES,
    TYPES,
    parse_object,
    read_array,
    read_index,
    write,
)

FORMAT = "dam-masks/4"
EARLIER = ("dam-masks/1", "dam-masks/2", "dam-masks/3")
METADATA = {"format", "header", "digest"}
# Of memory. With 32 layers of 32 heads (Llama 3.1 8B) columns and diagonals up to 131,072 tokens
# take 0.25 GiB and true masks of a PCL of 2048 as much; with 80 of 64 (70B) both take 2.5 GiB.
MAX_BYTES = 4 * 2**30
BIT_ARRAYS = ("columns", "diagonals")
REQUIRED = ("columns", "diagonals", "true_bits", "modes")
OPTIONAL = {
    "coverage": "F32",
    "coverage_extended": "F32",
    "density_lengths": "I32",
    "density_heads": "F32",
    "density_kv": "F32",
    "anchors": "I32",
    "tails": "U8",
}
DYNAMIC = "dynamic."
DYNAMIC_TYPES = {
    "rotations": "F32",
    "channels": "I32",
    "kinds": "U8",
    "budgets": "F32",
    "floors": "I32",
    "caps": "I32",
    "expected": "F32",
}
FRONTIER = "frontier."
FRONTIER_TYPES = {
    **dict.fromkeys(("density", "cost", "kl", "top1", "budgets", "expected"), "F32"),
    **dict.fromkeys(("patterns", "anchors", "channels", "floors", "caps", "offsets"), "I32"),
    **dict.fromkeys(("modes", "tails", "kinds", "bits"), "U8"),
}
GROUPS = {DYNAMIC: DYNAMIC_TYPES, FRONTIER: FRONTIER_TYPES}
"""Arrays that stand together, all of a group or none."""
ARRAYS = (
    dict.fromkeys(REQUIRED, "U8")
    | OPTIONAL
    | {prefix + name: dtype for prefix, group in GROUPS.items() for name, dtype in group.items()}
)
"""Every array's name and dtype in the file."""


class MaskFileError(ValueError):
    """A mask file that is missing, damaged, changed or of another format."""


def save_mask_set(masks: MaskSet, path: str | Path) -> None:
    """Writes a mask file; a file already there is replaced only by a whole one.

    The same masks give the same bytes.

    Args:
        masks: what to write.
        path: the file; its folder is made if need be.

    Raises:
        MaskFileError: for masks that `load_mask_set` would refuse.
    """
    arrays = {name: getattr(masks, name) for name in REQUIRED + tuple(OPTIONAL)}
    for prefix, group in ((DYNAMIC, masks.dynamic), (FRONTIER, masks.frontier)):
        if group is not None:
            arrays |= {prefix + name: array for name, array in vars(group).items()}
    packed = {
        name: np.packbits(array, axis=-1) if name in BIT_ARRAYS else np.ascontiguousarray(array)
        for name, array in arrays.items()
        if array is not None
    }
    packed["true_bits"] = np.frombuffer(zlib.compress(packed["true_bits"].tobytes()), np.uint8)
    try:
        masks.check_values()
        size = _checked_size((n, NAMES.get(a.dtype), a.shape) for n, a in packed.items())
        _refuse_size(size + masks.true_bits.nbytes)
        header = masks.header.model_dump_json()
        _header(header)
        metadata = {"format": FORMAT, "header": header, "digest": digest(header, packed)}
        with replacing(Path(path)) as temporary:
            write(temporary, metadata, packed)
    except ValueError as error:
        raise MaskFileError(f"mask file {path} is not written: {error}") from error


def load_mask_set(path: str | Path) -> MaskSet:
    """Reads a mask file.

    Args:
        path: the file.

    Returns:
        The mask set, every array checked for shape, dtype and what its values mean.

    Raises:
        MaskFileError: if the file is missing, damaged, changed since it was made, or no mask file
            of this format.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise MaskFileError(f"mask file {path} does not exist")
        with path.open("rb") as stream:
            return _load(path, stream)
    except MaskFileError:
        raise
    except (OSError, MemoryError) as error:
        reason = str(error) or "not enough memory"
        raise MaskFileError(f"mask file {path} cannot be read: {reason}") from error
    except ValueError as error:
        raise MaskFileError(f"mask file {path} is damaged: {error}") from error


def longest_pcl(layers: int, heads: int, reach: int | None) -> int:
    """The longest PCL of masks that a file may hold, if deflating true masks gains nothing.

    Args:
        layers: all layers of the model.
        heads: query heads of a layer.
        reach: of columns and diagonals in tokens, or None for the PCL.

    Returns:
        Tokens, 0 where not even the columns and diagonals fit.
    """
    room = MAX_BYTES // (layers * heads)
    # True masks take pcl ** 2 / 16 bytes a head, inflated and deflated as much.
    return isqrt(8 * room + 64) - 8 if reach is None else isqrt(8 * max(0, room - 2 * reach))


def digest(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a header's text and of every array's name, dtype, shape and bytes, hexadecimal.

    Args:
        header: the text.
        arrays: as they lie in the file.
    """
    names = sorted(arrays)
    told = [(name, NAMES[arrays[name].dtype], arrays[name].shape) for name in names]
    found = hashlib.sha256(json.dumps([header, told]).encode())
    for name in names:
        found.update(arrays[name].data.cast("B"))
    return found.hexdigest()


def _load(path: Path, stream: BufferedReader) -> MaskSet:
    index = read_index(stream)
    metadata = index.metadata
    _refuse_format(path, metadata.get("format"))
    if metadata.keys() != METADATA:
        raise ValueError(
            f"its metadata names {reprlib.repr(sorted(metadata))}, must be {sorted(METADATA)}"
        )
    _refuse_unknown("array", index.arrays, ARRAYS)
    entries = index.entries()
    size = _checked_size((name, each.dtype, each.shape) for name, each in entries.items())
    _refuse_size(size)
    arrays = {name: read_array(stream, name, entry) for name, entry in entries.items()}
    found = digest(metadata["header"], arrays)
    if metadata["digest"] != found:
        raise MaskFileError(
            f"mask file {path} was changed after it was made: header and arrays have digest "
            f"{found}, it says {reprlib.repr(metadata['digest'])}; restore it or calibrate again"
        )
    masks = _mask_set(_header(metadata["header"]), arrays, size)
    masks.check_values()
    return masks


def _refuse_format(path: Path, found: str | None) -> None:
    if found in EARLIER:
        raise MaskFileError(
            f"mask file {path} has format {found!r}, made by an earlier version (this one reads "
            f"{FORMAT!r}); calibrate again"
        )
    if found != FORMAT:
        raise MaskFileError(
            f"{path} is no mask file: its format is {reprlib.repr(found)}, must be {FORMAT!r}"
        )


def _refuse_unknown(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{what} {reprlib.repr(name)} is unknown, must be one of {', '.join(known)}"
            )


def _checked_size(arrays: Iterable[tuple[str, str | None, tuple[int, ...]]]) -> int:
    """Bytes of memory that arrays (name, dtype, shape) take, true masks deflated.

    Raises:
        ValueError: if one is missing or of another dtype.
    """
    total, names = 0, set()
    for name, dtype, shape in arrays:
        if dtype != ARRAYS[name]:
            raise ValueError(f"array {name!r} is {dtype}, must be {ARRAYS[name]}")
        # A bit takes a byte in memory.
        total += prod(shape) * (8 if name in BIT_ARRAYS else TYPES[ARRAYS[name]].itemsize)
        names.add(name)
    needed = list(REQUIRED)
    for prefix, group in GROUPS.items():
        if any(name.startswith(prefix) for name in names):
            needed += [prefix + name for name in group]
    for name in needed:
        if name not in names:
            raise ValueError(f"array {name!r} is missing")
    return total


def _refuse_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"its masks take {size} bytes of memory, must be at most {MAX_BYTES}")


def _header(text: str) -> Header:
    """Parses the header; the first error alone is told."""
    told = parse_object("header", text)
    # Pydantic keeps an error for each unknown name, however many there are.
    _refuse_unknown("header entry", told, Header.model_fields)
    if isinstance(told.get("fingerprint"), dict):
        _refuse_unknown("fingerprint entry", told["fingerprint"], Fingerprint.model_fields)
    try:
        header = Header.model_validate(told, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"header entry {place!r} is {reprlib.repr(first['input'])}: {first['msg']}"
        ) from None
    header.model_dump_json()  # refuses strings that are no Unicode
    return header


def _mask_set(header: Header, arrays: dict[str, np.ndarray], size: int) -> MaskSet:
    """Masks of the arrays of a file, which take `size` bytes as `_checked_size` tells them."""
    reach = header.reach or header.pcl
    for name in BIT_ARRAYS:
        if arrays[name].shape[-1] != ceil_div(reach, 8):
            raise ValueError(f"array {name!r} does not hold {reach} bits a row")
        refuse_padding(name, arrays[name], -reach % 8)
        arrays[name] = np.unpackbits(arrays[name], axis=-1, count=reach).view(bool)
    if arrays["columns"].ndim == 3:  # else it is refused below
        layers, heads = arrays["columns"].shape[:2]
        shape = (layers, heads, lower_bytes(header.pcl))
        _refuse_size(size + prod(shape))
        arrays["true_bits"] = _true_bits(arrays["true_bits"], shape)
    dynamic, frontier = _group(arrays, DYNAMIC), _group(arrays, FRONTIER)
    return MaskSet(
        header=header,
        dynamic=Dynamic(**dynamic) if dynamic else None,
        frontier=Frontier(**frontier) if frontier else None,
        **arrays,
    )


def _true_bits(deflated: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Inflates the true masks, uint8 [layers, heads, bytes]."""
    try:
        return inflate(deflated.reshape(-1).data, prod(shape)).reshape(shape)
    except ValueError as error:
        raise ValueError(f"array 'true_bits' {error}") from None


def _group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Takes the arrays of a group out, where there are any."""
    names = GROUPS[prefix]
    return {name: arrays.pop(prefix + name) for name in names if prefix + name in arrays}
