"""What is already measured: JSON lines in a folder, so that a stopped evaluation goes on."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from dam_vllm.evaluation.client import Logprobs
from dam_vllm.evaluation.settings import Key

RECORDS = "records.jsonl"


class State:
    """The records of one evaluation.

    Args:
        folder: where they lie; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / RECORDS
        self._records: dict[Key, dict[str, Any]] = {}
        if self._file.exists():
            self._read()

    def _read(self) -> None:
        """Reads all whole lines and cuts off what a crash left of the last one."""
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._file, len(whole))
        for line in whole.splitlines():
            record = json.loads(line)
            self._records[tuple(record.pop("key"))] = record

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._records[key]

    def add(self, key: Key, record: dict[str, Any]) -> None:
        """Stores a record, on disk at once.

        Args:
            key: what was measured.
            record: the measurement, JSON values.
        """
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **record}) + "\n")
        self._records[key] = record

    def add_logprobs(self, name: str, found: Logprobs) -> None:
        """Stores log-probabilities under a name."""
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, **vars(found))
        os.replace(temporary, self.folder / f"{name}.npz")

    def logprobs(self, name: str) -> Logprobs:
        """Log-probabilities stored under a name."""
        with np.load(self.folder / f"{name}.npz") as arrays:
            return Logprobs(**arrays)


def digest(*parts: object) -> str:
    """Hexadecimal name of some values that JSON can write."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_digest(masks: Path) -> str:
    """Hexadecimal name of what a mask file masks: all it holds but its quality report.

    Args:
        masks: a mask file that can be read.

    Returns:
        The same for a file before and after its report was stored.
    """
    result = hashlib.sha256()
    with safe_open(masks, framework="numpy") as file:
        header = json.loads(file.metadata()["header"])
        header.pop("quality", None)
        result.update(json.dumps(header, sort_keys=True).encode())
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            result.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return result.hexdigest()[:16]
