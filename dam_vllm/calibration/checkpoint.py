"""The checkpoint folder of an unfinished calibration: maps in safetensors, state in JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.lock import LOCK
from dam_vllm.calibration.state_files import read_arrays, read_json, write_arrays, write_json
from dam_vllm.calibration.static.maps import MapSums

STATE = "state.json"
PASS = "pass.safetensors"  # nosec B105
MAP = "maps"
# Counted up when what a folder holds changes its meaning or shape: 2, parts of texts are probed
# apart.
FORMAT = 3

MapKind = Literal["tokens", "pages"]


class Checkpoint:
    """Folder with the mean maps of finished layers and the sums of the pass in work.

    Every file is written beside itself and renamed, so that a crash leaves the former one.

    Attributes:
        folder: where it lies.
        chosen: what the first run chose (PCL, passes of each kind of maps, memory), reused by the
            next.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens what the folder holds, if anything.

        Args:
            folder: the folder, which nobody else works in (`lock.alone_in`).
            settings: all that decides the result, JSON values.

        Raises:
            CalibrationError: if the folder holds a checkpoint of other settings, or none that
                can be read.
        """
        self.folder = folder
        self.chosen: dict[str, Any] | None = None
        text = json.dumps(settings | {"format": FORMAT}, sort_keys=True)
        self._hash = hashlib.sha256(text.encode()).hexdigest()
        state = folder / STATE
        if state.exists():
            self._open(state)

    def _open(self, state: Path) -> None:
        try:
            found = read_json(state)
            stored, chosen = found["settings"], found["chosen"]
        except (KeyError, TypeError) as error:
            raise CalibrationError(
                f"checkpoint {self.folder} is damaged ({error}): remove it to start anew"
            ) from error
        if stored != self._hash:
            raise CalibrationError(
                f"checkpoint {self.folder} was made with other settings, model, texts or versions: "
                "go on with those, or remove the folder to start anew"
            )
        self.chosen = chosen

    def choose(self, chosen: dict[str, Any]) -> None:
        """Stores what the first run chose."""
        self.chosen = chosen
        write_json(self.folder / STATE, {"settings": self._hash, "chosen": chosen})

    def has_layer(self, kind: MapKind, layer: int) -> bool:
        """Whether a layer's mean map is stored."""
        return self._layer(kind, layer).exists()

    def save_layer(self, kind: MapKind, layer: int, mean: torch.Tensor) -> None:
        """Stores a finished layer's mean map, float32 [heads, size, size]."""
        self._write(self._layer(kind, layer), mean, {})

    def load_layer(self, kind: MapKind, layer: int) -> torch.Tensor:
        """Reads a finished layer's mean map."""
        return self._read(self._layer(kind, layer))[0]

    def save_pass(self, kind: MapKind, sums: MapSums, batches: int) -> None:
        """Stores the sums of the pass in work after some batches."""
        captured = json.dumps([kind, sums.layers])
        metadata = {"captured": captured, "batches": str(batches)}
        self._write(self.folder / PASS, sums.sums, metadata)

    def load_pass(self, kind: MapKind, layers: list[int]) -> tuple[torch.Tensor, int] | None:
        """Reads the sums of a pass and the batches they hold, if it is the one in work."""
        if not (self.folder / PASS).exists():
            return None
        sums, metadata = self._read(self.folder / PASS)
        if json.loads(metadata["captured"]) != [kind, layers]:
            return None
        return sums, int(metadata["batches"])

    def remove(self) -> None:
        """Removes what it stored, the state last: what is left by a crash can be gone on from."""
        kept = (STATE, LOCK)
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()
        (self.folder / STATE).unlink()

    def _layer(self, kind: MapKind, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:04}.safetensors"

    def _write(self, path: Path, maps: torch.Tensor, metadata: dict[str, str]) -> None:
        write_arrays(path, {MAP: maps.cpu().numpy()}, metadata)

    def _read(self, path: Path) -> tuple[torch.Tensor, dict[str, str]]:
        arrays, metadata = read_arrays(path)
        return torch.from_numpy(arrays[MAP]), metadata
