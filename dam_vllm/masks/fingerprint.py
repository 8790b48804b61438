"""Which model a mask file belongs to.

Masks are made from a model's attention maps, so they hold for one set of weights. The
identity has two parts. `config` hashes the numbers that shape attention (layers, heads, head
size, rotary embedding, windows, vocabulary): what must agree for the masks to fit at all.
`weights` hashes every tensor's name, dtype and shape with a few bytes sampled from it: it
tells a fine-tuned or re-quantised model from its base within a fraction of a second, does not
depend on how the tensors are spread over files, and needs no whole pass over many gigabytes.
Names, paths and vLLM's own settings are no part of either.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
)
PART = r"^[0-9A-Za-z]{1,64}$"
SAMPLES = 4
SAMPLE_BYTES = 64


class Fingerprint(BaseModel):
    """Identity of a model, hexadecimal SHA-256 prefixes.

    Attributes:
        config: of what shapes attention.
        weights: of the weights, or None where masks hold for any weights of that shape.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str = Field(pattern=PART)
    weights: str | None = Field(default=None, pattern=PART)

    def mismatch(self, served: "Fingerprint") -> str | None:
        """Says how the masks' model (self) differs from the served one, or None."""
        if self.config != served.config:
            return "config"
        if self.weights is not None and self.weights != served.weights:
            return "weights"
        return None


class FingerprintError(ValueError):
    """A model whose identity cannot be read."""


def fingerprint(
    model: str, revision: str | None = None, cache_dir: str | None = None, weights: bool = True
) -> Fingerprint:
    """Identifies a model on disk or on the Hugging Face Hub.

    Args:
        model: folder or Hub id.
        revision: Hub revision.
        cache_dir: where Hub files lie, or None for the default.
        weights: whether to read the weights too; False leaves that part None.

    Returns:
        The fingerprint. `weights` is None too where the model has no safetensors files.

    Raises:
        FingerprintError: if there is no such model or its files are damaged.
    """
    folder = _folder(model, revision, cache_dir, weights)
    return Fingerprint(
        config=_config_hash(folder), weights=_weights_hash(folder) if weights else None
    )


def _folder(model: str, revision: str | None, cache_dir: str | None, weights: bool) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors"] if weights else ["config.json"]
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir,
                                      allow_patterns=patterns))  # fmt: skip
    except Exception as error:
        raise FingerprintError(
            f"model {model!r} is neither a folder nor a model that the Hugging Face Hub "
            f"gives here: {error}"
        ) from error


def _config_hash(folder: Path) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise FingerprintError(f"{folder}: no readable config.json: {error}") from error
    values: dict[str, Any] = {key: getattr(config, key, None) for key in CONFIG_KEYS}
    return _digest(json.dumps(values, sort_keys=True, default=str).encode())


def _weights_hash(folder: Path) -> str | None:
    entries = [entry for file in sorted(folder.glob("*.safetensors")) for entry in _tensors(file)]
    return _digest(b"\n".join(sorted(entries))) if entries else None


def _tensors(file: Path) -> list[bytes]:
    """One line a tensor: name, dtype, shape and sampled bytes."""
    with file.open("rb") as stream:
        try:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(size))
        except (struct.error, ValueError, MemoryError, OverflowError) as error:
            raise FingerprintError(f"{file} is no readable safetensors file: {error}") from error
        header.pop("__metadata__", None)
        return [
            f"{name} {item['dtype']} {item['shape']} ".encode()
            + _sample(stream, 8 + size, *item["data_offsets"]).hex().encode()
            for name, item in header.items()
        ]


def _sample(stream: BinaryIO, base: int, start: int, stop: int) -> bytes:
    """SAMPLES pieces spread evenly over a tensor's bytes."""
    last = max(start, stop - SAMPLE_BYTES)
    pieces = []
    for index in range(SAMPLES):
        offset = start + (last - start) * index // (SAMPLES - 1)
        stream.seek(base + offset)
        pieces.append(stream.read(min(SAMPLE_BYTES, stop - offset)))
    return b"".join(pieces)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
