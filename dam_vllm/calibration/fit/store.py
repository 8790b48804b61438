"""What an unfinished fit has done so far: texts, bases, sums, readers, probes and proofs."""

from pathlib import Path

import numpy as np

from dam_vllm.calibration.fit.losses import ARRAYS, Sums
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.state_files import read_arrays, read_json, write_arrays, write_json
from dam_vllm.masks.mask_set import FloatArray


class FitStore:
    """Files in a calibration's checkpoint folder, each written beside itself and renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def texts(self) -> list[FitText]:
        """Texts whose replies are known, in order."""
        path = self._folder / "fit-texts.json"
        if not path.exists():
            return []
        return [FitText(**each) for each in read_json(path)]

    def save_texts(self, texts: list[FitText]) -> None:
        """Stores all texts so far."""
        write_json(self._folder / "fit-texts.json", [vars(text) for text in texts])

    def rotations(self) -> FloatArray | None:
        """The bases, once they are known."""
        path = self._folder / "fit-bases.safetensors"
        return read_arrays(path)[0]["rotations"] if path.exists() else None

    def save_rotations(self, rotations: FloatArray) -> None:
        """Stores the bases, float32 [layers, kv_heads, head_size, head_size]."""
        self._write("fit-bases", {"rotations": rotations})

    def sums(self, text: int, strata: list[str]) -> Sums | None:
        """A text's sums, if it has been measured."""
        path = self._folder / f"fit-{text:04}.safetensors"
        if not path.exists():
            return None
        found = read_arrays(path)[0]
        return Sums(strata, *(found[name] for name in ARRAYS))

    def save_sums(self, text: int, sums: Sums) -> None:
        """Stores a text's sums."""
        self._write(f"fit-{text:04}", {name: getattr(sums, name) for name in ARRAYS})

    def readers(self, text: int) -> np.ndarray | None:
        """A text's errors of heads that read others' pages, if they have been measured."""
        path = self._folder / f"fit-readers-{text:04}.safetensors"
        return read_arrays(path)[0]["error"] if path.exists() else None

    def save_readers(self, text: int, error: np.ndarray) -> None:
        """Stores a text's errors of readers."""
        self._write(f"fit-readers-{text:04}", {"error": error})

    def probes(self, kind: str, layer: int) -> np.ndarray | None:
        """KL of a layer's probes [probes, parts, kv_heads + 1] on a kind of text, once run."""
        path = self._folder / f"fit-probes-{kind}-{layer:04}.safetensors"
        return read_arrays(path)[0]["kl"] if path.exists() else None

    def save_probes(self, kind: str, layer: int, kls: np.ndarray) -> None:
        """Stores the KL of a layer's probes on a kind of text."""
        self._write(f"fit-probes-{kind}-{layer:04}", {"kl": kls})

    def proof(self, key: str) -> tuple[float, float] | None:
        """The loss that a choice was measured to have, and its share of equal best tokens."""
        found = self._proofs().get(key)
        return None if found is None else (found[0], found[1])

    def save_proof(self, key: str, measured: tuple[float, float]) -> None:
        """Stores what a choice was measured to have."""
        write_json(self._folder / "fit-proofs.json", self._proofs() | {key: list(measured)})

    def _proofs(self) -> dict[str, list[float]]:
        path = self._folder / "fit-proofs.json"
        return read_json(path) if path.exists() else {}

    def _write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        write_arrays(self._folder / f"{name}.safetensors", arrays)
