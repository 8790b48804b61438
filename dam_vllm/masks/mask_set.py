"""The mask set: every head's kept columns, kept diagonals, true mask and mode."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dam_vllm.masks.budget import MAX_TOKENS
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.frontier_arrays import Frontier
from dam_vllm.masks.ranges import refuse_outside, refuse_padding
from dam_vllm.masks.rounding import ceil_div

BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

LayerType = Literal["full", "sliding", "other"]
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_PCL = 2**16
MAX_REACH = 2**22
MAX_PAGE = 4096
# Attention weights in bfloat16 add up to 1 within so much.
COVERAGE_WITHIN = 0.01


class HeadMode(IntEnum):
    """How a KV head chooses the pages it reads."""

    STATIC = 0
    DYNAMIC = 1
    DENSE = 2
    REUSE = 3
    """Its static pages, and those that another, dynamic head chose: its *anchor*."""


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
    model: str = Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    fingerprint: Fingerprint
    layer_types: list[LayerType] = Field(min_length=1, max_length=MAX_LAYERS)
    pcl: int = Field(ge=1, le=MAX_PCL)
    reach: int | None = Field(default=None, ge=1, le=MAX_REACH)
    parameters: dict[str, Any] = Field(default_factory=dict)
    quality: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _check_page_of_fit(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """The one of the parameters that is used later."""
        fit = parameters.get("fit", {"page": 1})
        page = fit.get("page") if isinstance(fit, dict) else None
        if type(page) is not int or not 1 <= page <= MAX_PAGE:
            raise ValueError(f"fit.page must be tokens a page, from 1 to {MAX_PAGE}")
        return parameters

    @property
    def fitted_page(self) -> int | None:
        """Tokens of the pages that the masks were fitted for; None where nothing was fitted."""
        fit = self.parameters.get("fit")
        return None if fit is None else int(fit["page"])


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
        anchors: int32 [layers, kv_heads, 2], layer and KV head of the anchor of each head that
            reuses pages, of its own layer or an earlier one; -1 for heads of another mode. None
            where no head does.
        frontier: what else the fit could choose, see `dam_vllm.masks.targets`, or None.
        tails: uint8 [layers, kv_heads], 1 for heads whose unread pages have a tail
            (`dam_vllm.masks.tails`); None where no head has.
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
    anchors: npt.NDArray[np.int32] | None = None
    frontier: Frontier | None = None
    tails: ByteArray | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_modes()

    def check_values(self) -> None:
        """Checks what every value means, as it is done when a file is read or written.

        What was checked when the set was made is checked again, for arrays that changed since.

        Raises:
            ValueError: naming the array, a value that it may not hold, and what is allowed.
        """
        self._check_modes()
        self._check_layers_left_to_vllm()
        spare = -(self.pcl * (self.pcl + 1) // 2) % 8
        refuse_padding("true_bits", self.true_bits, spare)
        for name in ("coverage", "coverage_extended"):
            values = getattr(self, name)
            if values is not None:
                refuse_outside(name, values, 0, 1 + COVERAGE_WITHIN, nan=True)
        if self.density_lengths is not None:
            low = np.append(1, self.density_lengths[:-1].astype(np.int64) + 1)
            refuse_outside("density_lengths", self.density_lengths, low, MAX_TOKENS)
            for name in ("density_heads", "density_kv"):
                values = getattr(self, name)
                if values is not None:
                    refuse_outside(name, values, 0, 1)
        if self.dynamic is not None:
            self.dynamic.check_rotations()
        if self.frontier is not None:
            if "fit" not in self.header.parameters:
                raise ValueError("there is a frontier, but the header's parameters tell no 'fit'")
            self.frontier.check_points(self, spare)

    def _check_shapes(self) -> None:
        for name, dimensions in (("columns", 3), ("modes", 2), ("density_lengths", 1)):
            array = getattr(self, name)
            if array is not None and (array.ndim != dimensions or 0 in array.shape):
                raise ValueError(
                    f"{name} has shape {array.shape}, must have {dimensions} sizes of at least 1"
                )
        layers, heads, reach = self.columns.shape
        pcl, kv_heads = self.header.pcl, self.kv_heads
        if heads > MAX_HEADS or heads % kv_heads:
            raise ValueError(
                f"{heads} query heads: must be at most {MAX_HEADS} and a multiple of the "
                f"{kv_heads} KV heads"
            )
        lengths = 0 if self.density_lengths is None else len(self.density_lengths)
        expected = {
            "diagonals": (layers, heads, reach),
            "true_bits": (layers, heads, lower_bytes(pcl)),
            "modes": (layers, kv_heads),
            "coverage": (layers, heads),
            "coverage_extended": (layers, heads),
            "density_heads": (lengths, layers, heads),
            "density_kv": (lengths, layers, kv_heads),
            "anchors": (layers, kv_heads, 2),
            "tails": (layers, kv_heads),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if len(self.header.layer_types) != layers:
            raise ValueError(
                f"layer_types names {len(self.header.layer_types)} layers, the masks hold {layers}"
            )
        if (self.header.reach or pcl) != reach or reach < pcl:
            raise ValueError(
                f"header says pcl {pcl} and reach {self.header.reach}, the masks hold {reach}"
            )

    def _check_modes(self) -> None:
        refuse_outside("modes", self.modes, 0, max(HeadMode))
        if self.dynamic is not None:
            self.dynamic.check(self.layers, self.kv_heads)
        elif (self.modes == HeadMode.DYNAMIC).any():
            raise ValueError("a head is dynamic, but there are no bases and budgets")
        self._check_anchors()
        self._check_tails()
        if self.frontier is not None:
            self.frontier.check(self.layers, self.kv_heads)

    def _check_layers_left_to_vllm(self) -> None:
        for layer, kind in enumerate(self.header.layer_types):
            for name in ("columns", "diagonals", "true_bits"):
                if kind != "full" and getattr(self, name)[layer].any():
                    raise ValueError(
                        f"{name}[{layer}] has bits, must be zeros in a layer of type {kind!r}"
                    )

    def _check_anchors(self) -> None:
        reuses = self.modes == HeadMode.REUSE
        if self.anchors is None:
            if reuses.any():
                raise ValueError("a head reuses pages, but there are no anchors")
            return
        if (self.anchors[~reuses] != -1).any():
            raise ValueError("a head that reuses no pages has an anchor")
        for layer, head in np.argwhere(reuses):
            of_layer, of_head = self.anchors[layer, head]
            if not (0 <= of_layer <= layer and 0 <= of_head < self.kv_heads):
                raise ValueError(
                    f"layer {layer}, KV head {head} reuses pages of layer {of_layer}, KV head "
                    f"{of_head}: must be a head of its own layer or an earlier one"
                )
            if self.modes[of_layer, of_head] != HeadMode.DYNAMIC:
                raise ValueError(
                    f"layer {layer}, KV head {head} reuses pages of layer {of_layer}, KV head "
                    f"{of_head}, which is not dynamic"
                )
            if self.header.layer_types[of_layer] != "full":
                raise ValueError(
                    f"layer {layer}, KV head {head} reuses pages of layer {of_layer}, which is "
                    f"left to vLLM"
                )

    def _check_tails(self) -> None:
        if self.tails is None:
            return
        refuse_outside("tails", self.tails, 0, 1)
        full = np.array([kind == "full" for kind in self.header.layer_types])
        sparse = (self.modes != HeadMode.DENSE) & full[:, None]
        for layer, head in np.argwhere(self.tails.astype(bool) & ~sparse):
            raise ValueError(
                f"layer {layer}, KV head {head} has a tail, but reads every page: must be of "
                f"another mode than dense, in a layer of type 'full'"
            )

    def anchor(self, layer: int, head: int) -> tuple[int, int]:
        """Layer and KV head whose choice a reusing KV head follows."""
        assert self.anchors is not None
        of_layer, of_head = self.anchors[layer, head]
        return int(of_layer), int(of_head)

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
    return ceil_div(pcl * (pcl + 1) // 2, 8)


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
