"""What an unfinished fit has done so far: texts, bases, sums, probes and proofs."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from dam_vllm.calibration.fit.losses import Sums
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.masks.mask_set import FloatArray

ARRAYS = ("error", "norm", "chosen", "causal")


class FitStore:
    """Files in a calibration's checkpoint folder, each written beside itself and renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def texts(self) -> list[FitText]:
        """Texts whose replies are known, in order."""
        path = self._folder / "fit-texts.json"
        if not path.exists():
            return []
        return [FitText(**each) for each in json.loads(path.read_text(encoding="utf-8"))]

    def save_texts(self, texts: list[FitText]) -> None:
        """Stores all texts so far."""
        path = self._folder / "fit-texts.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps([vars(text) for text in texts]), encoding="utf-8")
        os.replace(temporary, path)

    def rotations(self) -> FloatArray | None:
        """The bases, once they are known."""
        path = self._folder / "fit-bases.safetensors"
        return load_file(path)["rotations"] if path.exists() else None

    def save_rotations(self, rotations: FloatArray) -> None:
        """Stores the bases, float32 [layers, kv_heads, head_size, head_size]."""
        self._write("fit-bases", {"rotations": rotations})

    def sums(self, text: int, groups: list[str]) -> Sums | None:
        """A text's sums, if it has been measured."""
        path = self._folder / f"fit-{text:04}.safetensors"
        if not path.exists():
            return None
        found = load_file(path)
        return Sums(groups, *(found[name] for name in ARRAYS))

    def save_sums(self, text: int, sums: Sums) -> None:
        """Stores a text's sums."""
        self._write(f"fit-{text:04}", {name: getattr(sums, name) for name in ARRAYS})

    def probes(self, layer: int) -> np.ndarray | None:
        """KL of a layer's probes [probes, kinds, kv_heads], if they have been run."""
        path = self._folder / f"fit-probes-{layer:04}.safetensors"
        return load_file(path)["kl"] if path.exists() else None

    def save_probes(self, layer: int, kls: np.ndarray) -> None:
        """Stores the KL of a layer's probes."""
        self._write(f"fit-probes-{layer:04}", {"kl": kls})

    def proof(self, key: str) -> float | None:
        """The loss that a choice was measured to have."""
        return self._proofs().get(key)

    def save_proof(self, key: str, loss: float) -> None:
        """Stores a choice's measured loss."""
        path = self._folder / "fit-proofs.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._proofs() | {key: loss}), encoding="utf-8")
        os.replace(temporary, path)

    def _proofs(self) -> dict[str, float]:
        path = self._folder / "fit-proofs.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        temporary = self._folder / f"{name}.tmp"
        save_file({key: np.ascontiguousarray(each) for key, each in arrays.items()}, temporary)
        os.replace(temporary, self._folder / f"{name}.safetensors")
