"""A safetensors file, read without trust: every size is checked before anything is allocated.

It is written here too: the package of that name orders metadata by chance, and masks that are made
again are to be the same file byte for byte.
"""

import json
import os
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

TYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
MAX_JSON_BYTES = 8 * 2**20
MAX_DIMENSIONS = 4
MAX_DIMENSION = 2**31 - 1
ALIGNMENT = 8
METADATA = "__metadata__"
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """Where an array lies.

    Attributes:
        dtype: a name of `TYPES`.
        shape: of one to `MAX_DIMENSIONS` sizes, each at least 1.
        start: its first byte, counted from the end of the JSON.
        stop: one past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Index:
    """The JSON that such a file starts with.

    Attributes:
        metadata: what the file says about itself.
        arrays: name to what the JSON says about an array; `entries` checks it.
        size: bytes of the file behind the JSON.
    """

    metadata: dict[str, str]
    arrays: dict[str, Any]
    size: int

    def entries(self) -> dict[str, Entry]:
        """Where the arrays lie, in the order of the file.

        Raises:
            ValueError: if a dtype, shape or place is none, or if the arrays do not fill the file
                without gap or overlap.
        """
        found = {name: _entry(name, told) for name, told in self.arrays.items()}
        ordered = sorted(found.items(), key=lambda item: item[1].start)
        at = 0
        for name, entry in ordered:
            if entry.start != at:
                raise ValueError(f"array {name!r} starts at byte {entry.start}, must start at {at}")
            at = entry.stop
        if at != self.size:
            raise ValueError(f"its arrays take {at} bytes, the file holds {self.size} for them")
        return dict(ordered)


def read_index(stream: BufferedReader) -> Index:
    """Reads the JSON of a file and leaves the stream at the first array.

    Args:
        stream: a file on disk, at its start.

    Raises:
        ValueError: if it is damaged or larger than is allowed.
    """
    size = os.fstat(stream.fileno()).st_size
    if size < 8:
        raise ValueError(f"it has {size} bytes, must have at least 8")
    length = struct.unpack("<Q", stream.read(8))[0]
    if length > min(MAX_JSON_BYTES, size - 8):
        raise ValueError(
            f"its JSON takes {length} bytes, must be at most {MAX_JSON_BYTES} and within the "
            f"file's {size}"
        )
    told = parse_object("JSON", stream.read(length).decode())
    metadata = told.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA} is {reprlib.repr(metadata)}, must hold strings")
    return Index(metadata, told, size - 8 - length)


def parse_object(what: str, text: str) -> dict[str, Any]:
    """Parses a JSON object whose numbers are finite.

    Args:
        what: its name, for errors.
        text: the JSON.

    Raises:
        ValueError: if the text is none.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} cannot be parsed: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {reprlib.repr(value)}, must be an object")
    return value


def read_array(stream: BufferedReader, name: str, entry: Entry) -> np.ndarray:
    """Reads the array that comes next, of the entry's dtype and shape.

    Args:
        stream: at the array's first byte.
        name: of the array, for errors.
        entry: of the array.

    Raises:
        ValueError: if the file ends before the array does.
    """
    array = np.empty(entry.shape, TYPES[entry.dtype])
    found = stream.readinto(array.data.cast("B"))
    if found != array.nbytes:
        raise ValueError(f"array {name!r} ends after {found} of {array.nbytes} bytes")
    return array


def write(path: Path, metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file; the same metadata and arrays give the same bytes.

    Args:
        path: the file.
        metadata: what it says about itself.
        arrays: contiguous arrays of the dtypes in `TYPES`.

    Raises:
        ValueError: if metadata and places take more JSON than is read again.
    """
    told: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    # Wide dtypes first, so that every array lies at a multiple of its item's size.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    at = 0
    for name in names:
        array = arrays[name]
        start, at = at, at + array.nbytes
        told[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, at],
        }
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"its JSON takes {len(text)} bytes, must be at most {MAX_JSON_BYTES}")
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            stream.write(arrays[name].data.cast("B"))


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{reprlib.repr(text)} is no finite number")
    return value


def _entry(name: str, told: Any) -> Entry:
    if not isinstance(told, dict) or told.keys() != ENTRY_KEYS:
        raise ValueError(
            f"array {name!r} is {reprlib.repr(told)}, must have dtype, shape and data_offsets"
        )
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise ValueError(
            f"array {name!r} has dtype {reprlib.repr(dtype)}, must be one of {', '.join(TYPES)}"
        )
    if not _integers(shape, 1, MAX_DIMENSIONS) or not all(1 <= n <= MAX_DIMENSION for n in shape):
        raise ValueError(
            f"array {name!r} has shape {reprlib.repr(shape)}, must be 1 to {MAX_DIMENSIONS} sizes "
            f"from 1 to {MAX_DIMENSION}"
        )
    size = prod(shape) * TYPES[dtype].itemsize
    if not _integers(offsets, 2, 2) or offsets[0] < 0 or offsets[1] - offsets[0] != size:
        raise ValueError(
            f"array {name!r} has data_offsets {reprlib.repr(offsets)}, must span the {size} bytes "
            f"of its shape {tuple(shape)}"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _integers(values: Any, fewest: int, most: int) -> bool:
    """Whether a JSON value is a list of so many integers (true and false are none)."""
    return (
        isinstance(values, list)
        and fewest <= len(values) <= most
        and all(type(value) is int for value in values)
    )
