"""Mask files taken apart and put together again, without the loader under test."""

import hashlib
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dam_vllm.masks.mask_set import HeadMode
from tests.conftest import random_mask_set

NAMES = {"uint8": "U8", "int32": "I32", "float32": "F32", "int64": "I64", "float64": "F64"}


@dataclass
class Parts:
    """What lies in a mask file: its metadata, and its arrays by name."""

    metadata: dict
    arrays: dict

    @classmethod
    def of(cls, path):
        data = Path(path).read_bytes()
        told = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        return cls(told["__metadata__"], load_file(path))

    @property
    def header(self):
        return json.loads(self.metadata["header"])

    def seal(self):
        """Makes the digest right again, by its definition in docs/calibration.md."""
        names = sorted(self.arrays)
        told = [
            [name, NAMES[str(self.arrays[name].dtype)], list(self.arrays[name].shape)]
            for name in names
        ]
        text = json.dumps([self.metadata["header"], told])
        data = b"".join(self.arrays[name].tobytes() for name in names)
        self.metadata["digest"] = hashlib.sha256(text.encode() + data).hexdigest()

    def entries(self):
        """The JSON's places of the arrays, in order of their names."""
        found, at = {}, 0
        for name, array in self.arrays.items():
            found[name] = {
                "dtype": NAMES[str(array.dtype)],
                "shape": list(array.shape),
                "data_offsets": [at, at + array.nbytes],
            }
            at += array.nbytes
        return found

    def bytes(self, entries=None):
        """The file, with other places in its JSON if given, or with other JSON altogether."""
        told = self.entries() if entries is None else entries
        if isinstance(told, dict):
            told = {"__metadata__": self.metadata} | told
        text = json.dumps(told).encode()
        data = b"".join(array.tobytes() for array in self.arrays.values())
        return struct.pack("<Q", len(text)) + text + data


def full_mask_set(rng, reach=None):
    """Random masks with all arrays: reuse, tails, a layer left to vLLM, coverage, density."""
    masks = random_mask_set(rng, layers=3, pcl=77, dynamic=True)
    columns, diagonals = rng.random((2, 3, 4, reach or 77)) < 0.03
    masks.header.layer_types[1] = "sliding"
    masks.header.reach = reach
    for array in (columns, diagonals, masks.true_bits):
        array[1] = 0
    modes, anchors = masks.modes.copy(), np.full((3, 2, 2), -1, np.int32)
    modes[2, 0], anchors[2, 0] = HeadMode.REUSE, (0, 1)
    tails = np.array([[1, 0], [0, 0], [0, 1]], np.uint8)
    return replace(
        masks,
        columns=columns,
        diagonals=diagonals,
        modes=modes,
        anchors=anchors,
        tails=tails,
        coverage=rng.random((3, 4), np.float32),
        coverage_extended=np.full((3, 4), np.nan, np.float32),
        density_lengths=np.array([77, 4096], np.int32),
        density_heads=rng.random((2, 3, 4), np.float32),
        density_kv=rng.random((2, 3, 2), np.float32),
    )
