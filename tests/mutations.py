"""Ways to damage a mask file, for `tests.fuzz_masks`.

Those on bytes, and on the places of arrays, leave the digest as it is; those on header and arrays
make it right again.
"""

import copy
import json
import struct

import numpy as np

ABSURD = [None, True, "", "x", [], {}, -1, 0, 1, 7, 1.5, 2**31, 2**32 + 1, 2**62, 2**63, 2**64,
          10**30, 1e308, float("nan"), "a" * 10**4, "\ud800", "\x1b[2J", [[]] * 50, [0] * 10**4,
          {"a": {"b": [1, None]}}]  # fmt: skip
LENGTHS = [0, 1, 7, 2**20, 2**23, 2**31, 2**40, 2**63, 2**64 - 1]
NUMBERS = [0, 1, -1, 2, 3, 4, 255, 2**31 - 1, -(2**31), 1e-30, 0.5, 1.0001, 1e30, np.inf, -np.inf,
           np.nan]  # fmt: skip
DTYPES = ["U8", "I32", "F32", "I64", "F64", "F16", "BOOL", "u8", "F128"]


def json_bytes(data):
    """Where the JSON of a file lies."""
    return 8, 8 + struct.unpack("<Q", data[:8])[0]


def pick(rng, values):
    """One of some values."""
    return values[rng.integers(len(values))]


def flip(rng, data, start=0, stop=None):
    changed = bytearray(data)
    for at in rng.integers(start, stop or len(data), rng.integers(1, 9)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def flip_json(rng, data):
    return flip(rng, data, *json_bytes(data))


def cut(rng, data):
    return data[: rng.integers(len(data))]


def cut_early(rng, data):
    return data[: rng.integers(json_bytes(data)[1] + 100)]


def extend(rng, data):
    return data + rng.bytes(rng.integers(1, 1000))


def remove(rng, data):
    start = rng.integers(len(data))
    return data[:start] + data[start + rng.integers(1, 100) :]


def insert(rng, data):
    start = rng.integers(len(data))
    return data[:start] + rng.bytes(rng.integers(1, 100)) + data[start:]


def overwrite(rng, data):
    start, size = rng.integers(len(data)), rng.integers(1, 2000)
    chunk = pick(rng, [bytes(size), b"\xff" * size, rng.bytes(size)])
    return data[:start] + chunk[: len(data) - start] + data[start + size :]


def swap_blocks(rng, data):
    size = int(rng.integers(1, 1000))
    one, other = sorted(rng.integers(0, len(data) - size, 2))
    other = max(other, one + size)
    return (
        data[:one] + data[other : other + size] + data[one + size : other]
        + data[one : one + size] + data[other + size :]
    )  # fmt: skip


def absurd_length(rng, data):
    near = json_bytes(data)[1] - 8 + int(rng.integers(-9, 10))
    return struct.pack("<Q", pick(rng, [*LENGTHS, near])) + data[8:]


def changed_value(rng, value):
    """A JSON value with one value in it, at any depth, replaced, dropped or added."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        value = copy.copy(value)
        key = pick(rng, list(value)) if isinstance(value, dict) else int(rng.integers(len(value)))
        kind = rng.integers(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[pick(rng, ["more", "", "columns", "x" * 10**4])] = pick(rng, ABSURD)
        elif kind == 1:
            value.insert(key, pick(rng, ABSURD))
        else:
            value[key] = changed_value(rng, value[key])
        return value
    if type(value) is int and rng.random() < 0.5:
        return value + int(rng.integers(-9, 10))
    return pick(rng, ABSURD)


def places(rng, parts):
    """Absurd entries of arrays."""
    return parts.bytes(changed_value(rng, parts.entries()))


def places_of_one(rng, parts):
    entries = parts.entries()
    entry = entries[pick(rng, list(entries))]
    key = pick(rng, list(entry))
    entry[key] = pick(rng, DTYPES) if key == "dtype" else changed_value(rng, entry[key])
    return parts.bytes(entries)


def metadata(rng, parts):
    """Absurd format, header or digest."""
    parts = copy.copy(parts)
    parts.metadata = changed_value(rng, parts.metadata)
    return parts.bytes()


def header_entry(rng, parts):
    parts.metadata["header"] = json.dumps(changed_value(rng, parts.header))


def header_short_entry(rng, parts):
    """One of the entries that matter, which all others outweigh."""
    header = parts.header
    key = pick(rng, ["kind", "model", "fingerprint", "layer_types", "pcl", "reach", "quality"])
    header[key] = changed_value(rng, header[key])
    parts.metadata["header"] = json.dumps(header)


def header_text(rng, parts):
    text = parts.metadata["header"]
    start = int(rng.integers(len(text)))
    parts.metadata["header"] = text[:start] + pick(rng, ["", "[" * 10**4, "\\ud800", "9" * 5000])


def some_name(rng, parts):
    return pick(rng, list(parts.arrays))


def array_value(rng, parts):
    array = parts.arrays[some_name(rng, parts)].reshape(-1)
    with np.errstate(all="ignore"):
        array[rng.integers(array.size, size=rng.integers(1, 4))] = (
            np.array(pick(rng, NUMBERS)).astype(array.dtype)
        )  # fmt: skip


def array_fill(rng, parts):
    array = parts.arrays[some_name(rng, parts)]
    with np.errstate(all="ignore"):
        array[...] = np.array(pick(rng, NUMBERS)).astype(array.dtype)


def array_bits(rng, parts):
    data = parts.arrays[some_name(rng, parts)].reshape(-1).view(np.uint8)
    for at in rng.integers(data.size, size=rng.integers(1, 9)):
        data[at] ^= 1 << rng.integers(8)


def array_noise(rng, parts):
    data = parts.arrays[some_name(rng, parts)].reshape(-1).view(np.uint8)
    data[...] = np.frombuffer(rng.bytes(data.size), np.uint8)


def array_shape(rng, parts):
    name = some_name(rng, parts)
    array = parts.arrays[name]
    axis = int(rng.integers(array.ndim))
    rolled = np.roll(array, 1, axis)
    changed = pick(rng, [array.T, array[None], array.reshape(-1), rolled, array[::-1],
                         np.delete(array, 0, axis), np.repeat(array, 2, axis), array[:0],
                         np.insert(array, 0, 0, axis)])  # fmt: skip
    parts.arrays[name] = np.ascontiguousarray(changed)


def array_dtype(rng, parts):
    name = some_name(rng, parts)
    array = parts.arrays[name]
    changed = pick(rng, [np.uint8, np.int32, np.float32, np.int64, np.float64])
    with np.errstate(all="ignore"):
        parts.arrays[name] = array.astype(changed)


def array_names(rng, parts):
    """Two arrays change places, one goes, or one comes."""
    one, other = some_name(rng, parts), some_name(rng, parts)
    arrays, kind = parts.arrays, rng.integers(3)
    if kind == 0:
        arrays[one], arrays[other] = arrays[other], arrays[one]
    elif kind == 1:
        del arrays[one]
    else:
        arrays[pick(rng, ["more", "", "dynamic.", "x" * 1000])] = arrays[one].copy()


BYTES = (flip, flip_json, cut, cut_early, extend, remove, insert, overwrite, swap_blocks,
         absurd_length)  # fmt: skip
PLACES = (places, places_of_one, metadata)
SEALED = (header_entry, header_short_entry, header_text, array_value, array_fill, array_bits,
          array_noise, array_shape, array_dtype, array_names)  # fmt: skip


def mutated(rng, data, parts):
    """One mutation of a file.

    Returns:
        The name of the mutation, the file's bytes, and whether its digest is right again.
    """
    change = pick(rng, BYTES + PLACES + SEALED)
    if change in BYTES:
        return change.__name__, change(rng, data), False
    if change in PLACES:
        return change.__name__, change(rng, parts), False
    parts = copy.deepcopy(parts)
    change(rng, parts)
    parts.seal()
    return change.__name__, parts.bytes(), True
