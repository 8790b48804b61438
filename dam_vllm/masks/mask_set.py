"""The mask set: every head's kept columns, kept diagonals, true mask and mode."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.fingerprint import Fingerprint

BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

LayerType = Literal["full", "sliding", "other"]


class HeadMode(IntEnum):
    """How a KV head chooses the pages it reads."""

    STATIC = 0
    DYNAMIC = 1
    DENSE = 2


class Header(BaseModel):
    """What a mask file says about itself, beside its arrays.

    Attributes:
        kind: how the masks were made.
        model: name or path of the model they were made for (information only).
        fingerprint: identity of that model, checked before serving.
        layer_types: per layer, "full" (masked), "sliding" or "other" (left to vLLM).
        pcl: Pattern Capture Length of token maps, in tokens: queries below it follow the true
            mask.
        reach: how far columns and diagonals were looked for, in tokens, at least the PCL; beyond
            the PCL they come from page maps. None for the PCL.
        parameters: every parameter that made the masks.
        quality: quality report of an evaluation, if one was stored.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["calibrated", "dense", "streaming"]
    model: str
    fingerprint: Fingerprint
    layer_types: list[LayerType] = Field(min_length=1)
    pcl: int = Field(ge=1)
    reach: int | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class MaskSet:
    """Masks of all layers; rows of layers that are not "full" are zeros.

    The rule they state (paper, section 3; the reading is told in docs/calibration.md): a query at
    position i < pcl attends key j where the true mask has (i, j); at i >= pcl, where j is a
    kept column or i - j a kept diagonal.

    Attributes:
        columns: bool [layers, heads, reach], kept key positions.
        diagonals: bool [layers, heads, reach], kept distances i - j.
        true_bits: uint8 [layers, heads, bytes], the true mask's lower triangle, row by row,
            packed eight pairs a byte (`pack_lower`).
        modes: uint8 [layers, kv_heads], a `HeadMode` each.
        header: what the file says about itself.
        coverage: float32 [layers, heads], attention mass that the true mask keeps on held-out
            texts, or None.
        coverage_extended: the same for rows at and beyond the PCL under columns and diagonals.
        density_lengths: int32 [n], lengths in tokens of the two tables below.
        density_heads: float32 [n, layers, heads], density of each query head on its own.
        density_kv: float32 [n, layers, kv_heads], density of what is really read.
        dynamic: bases and budgets, where a head is dynamic.
    """

    columns: BoolArray
    diagonals: BoolArray
    true_bits: ByteArray
    modes: ByteArray
    header: Header
    coverage: FloatArray | None = None
    coverage_extended: FloatArray | None = None
    density_lengths: npt.NDArray[np.int32] | None = None
    density_heads: FloatArray | None = None
    density_kv: FloatArray | None = None
    dynamic: Dynamic | None = None

    def __post_init__(self) -> None:
        layers, heads, reach = self.columns.shape
        pcl = self.header.pcl
        expected = {
            "diagonals": (layers, heads, reach),
            "true_bits": (layers, heads, lower_bytes(pcl)),
            "modes": (layers, self.modes.shape[-1]),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape}")
        if heads % self.kv_heads:
            raise ValueError(f"{heads} query heads are no multiple of {self.kv_heads} KV heads")
        if len(self.header.layer_types) != layers:
            raise ValueError(
                f"layer_types names {len(self.header.layer_types)} layers, the masks hold {layers}"
            )
        if (self.header.reach or pcl) != reach or reach < pcl:
            raise ValueError(
                f"header says pcl {pcl} and reach {self.header.reach}, the masks hold {reach}"
            )
        if self.dynamic is not None:
            self.dynamic.check(layers, self.kv_heads)
        elif (self.modes == HeadMode.DYNAMIC).any():
            raise ValueError("a head is dynamic, but there are no bases and budgets")

    @property
    def layers(self) -> int:
        return int(self.columns.shape[0])

    @property
    def heads(self) -> int:
        return int(self.columns.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.modes.shape[1])

    @property
    def pcl(self) -> int:
        return self.header.pcl

    @property
    def reach(self) -> int:
        return int(self.columns.shape[2])

    def true_mask(self, layer: int) -> BoolArray:
        """Returns the true masks of one layer, bool [heads, pcl, pcl]."""
        return unpack_lower(self.true_bits[layer], self.pcl)


def lower_bytes(pcl: int) -> int:
    """Bytes that the packed lower triangle of a [pcl, pcl] mask takes."""
    return (pcl * (pcl + 1) // 2 + 7) // 8


def pack_lower(mask: BoolArray) -> ByteArray:
    """Packs the lower triangle of bool [..., pcl, pcl] to uint8 [..., bytes]."""
    rows, cols = np.tril_indices(mask.shape[-1])
    return np.packbits(mask[..., rows, cols], axis=-1)


def unpack_lower(bits: ByteArray, pcl: int) -> BoolArray:
    """Inverse of `pack_lower`: uint8 [..., bytes] to bool [..., pcl, pcl]."""
    rows, cols = np.tril_indices(pcl)
    mask = np.zeros((*bits.shape[:-1], pcl, pcl), dtype=bool)
    mask[..., rows, cols] = np.unpackbits(bits, axis=-1, count=len(rows)).view(bool)
    return mask
