"""What a fit could choose from, as the mask file holds it: choices from cheapest to best."""

import zlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dam_vllm.masks.ranges import refuse_outside, refuse_padding
from dam_vllm.masks.rounding import ceil_div

if TYPE_CHECKING:
    from dam_vllm.masks.mask_set import MaskSet

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]

MEASURES = ("density", "cost", "kl", "top1")
DYNAMIC_FIELDS = ("channels", "kinds", "budgets", "floors", "caps", "expected")
PIECE = 2**16  # bytes that are inflated at once


@dataclass(frozen=True)
class Frontier:
    """Choices of all heads' modes, from the cheapest to the most careful.

    Attributes:
        density: float32 [points], mean over KV heads of full-attention layers, at the longest
            length of the fit.
        cost: float32 [points], the same with what choosing pages costs, in units of dense
            attention.
        kl: float32 [points], measured mean KL of the next token in nats, of the kind of text that
            loses most.
        top1: float32 [points], measured share of equal best tokens, of the kind that loses most.
        modes: uint8 [points, layers, kv_heads], a `HeadMode` each.
        patterns: int32 [points, layers, kv_heads], which of the stored patterns a head has.
        anchors: int32 [points, layers, kv_heads, 2], as `MaskSet.anchors`.
        tails: uint8 [points, layers, kv_heads], as `MaskSet.tails`.
        channels: int32 [points, layers, kv_heads], this and the next ones as in `Dynamic`.
        kinds: uint8 [points, layers, kv_heads].
        budgets: float32 [points, layers, kv_heads].
        floors: int32 [points, layers, kv_heads].
        caps: int32 [points, layers, kv_heads].
        expected: float32 [points, layers, kv_heads].
        offsets: int32 [patterns + 1], where each pattern starts in `bits`, and the end.
        bits: uint8 [bytes], patterns of `pack_pattern`, one after the other.
    """

    density: FloatArray
    cost: FloatArray
    kl: FloatArray
    top1: FloatArray
    modes: ByteArray
    patterns: IntArray
    anchors: IntArray
    tails: ByteArray
    channels: IntArray
    kinds: ByteArray
    budgets: FloatArray
    floors: IntArray
    caps: IntArray
    expected: FloatArray
    offsets: IntArray
    bits: ByteArray

    def check(self, layers: int, kv_heads: int) -> None:
        """Checks shapes and measures, and that patterns lie where they are said to.

        What the heads' modes and budgets and the patterns mean, `check_points` checks.

        Raises:
            ValueError: for an array of another shape, or a value that means nothing.
        """
        points = len(self.density)
        for name in (each.name for each in fields(self)):
            shape: tuple[int, ...] = (points, layers, kv_heads)
            if name in MEASURES:
                shape = (points,)
            elif name == "anchors":
                shape += (2,)
            elif name in ("offsets", "bits"):
                shape = (getattr(self, name).size,)
            found = getattr(self, name).shape
            if found != shape or not points:
                raise ValueError(f"frontier.{name} has shape {found}, expected {shape}")
        for name, most in (("density", 1.0), ("cost", np.inf), ("kl", np.inf), ("top1", 1.0)):
            refuse_outside(f"frontier.{name}", getattr(self, name), 0, most)
        starts = self.offsets
        if starts[0] != 0 or starts[-1] != len(self.bits) or (np.diff(starts) <= 0).any():
            raise ValueError("frontier.offsets do not cut frontier.bits into patterns")
        refuse_outside("frontier.modes", self.modes, 0, 3)
        refuse_outside("frontier.patterns", self.patterns, 0, len(starts) - 2)

    def choice(self, masks: "MaskSet", point: int) -> "MaskSet":
        """Masks with the modes, budgets, anchors and tails of a point, and their own patterns.

        Args:
            masks: those of this frontier.
            point: its index.

        Raises:
            ValueError: naming a value of the point that means nothing.
        """
        dynamic, anchors, tails = masks.dynamic, self.anchors[point], self.tails[point]
        if dynamic is not None:
            own = {name: getattr(self, name)[point] for name in DYNAMIC_FIELDS}
            dynamic = replace(dynamic, **own)
        return replace(
            masks,
            modes=self.modes[point],
            dynamic=dynamic,
            anchors=anchors if (anchors != -1).any() else None,
            tails=tails if tails.any() else None,
        )

    def check_points(self, masks: "MaskSet", spare: int) -> None:
        """Checks what every point's modes, budgets and anchors mean, and every pattern.

        Args:
            masks: those of this frontier.
            spare: bits of a true mask's last byte that hold no pair.

        Raises:
            ValueError: naming the point or pattern, a value that it may not hold, and what is
                allowed.
        """
        alone = replace(masks, frontier=None)
        for point in range(len(self.density)):
            try:
                self.choice(alone, point)
            except ValueError as error:
                raise ValueError(f"frontier, choice {point}: {error}") from None
        left = np.array([kind != "full" for kind in masks.header.layer_types])
        of_left_layers = set(self.patterns[:, left].ravel().tolist())
        sizes = (masks.heads // masks.kv_heads, masks.reach, masks.true_bits.shape[-1])
        for index in range(len(self.offsets) - 1):
            parts = unpack_pattern(self.pattern(index), *sizes)
            refuse_padding(f"frontier.bits, pattern {index}, true mask", parts[2], spare)
            if index in of_left_layers and any(part.any() for part in parts):
                raise ValueError(
                    f"frontier.bits: pattern {index} has bits, must be zeros for a layer that is "
                    f"left to vLLM"
                )

    def pattern(self, index: int) -> bytes:
        """A stored pattern."""
        return self.bits[self.offsets[index] : self.offsets[index + 1]].tobytes()


def pack_pattern(columns: np.ndarray, diagonals: np.ndarray, true_bits: ByteArray) -> bytes:
    """Deflates one KV head's pattern.

    Args:
        columns: bool [heads_per_kv, reach].
        diagonals: bool [heads_per_kv, reach].
        true_bits: uint8 [heads_per_kv, bytes].

    Returns:
        The bytes.
    """
    parts = (np.packbits(columns, axis=-1), np.packbits(diagonals, axis=-1), true_bits)
    return zlib.compress(b"".join(part.tobytes() for part in parts))


def unpack_pattern(
    packed: bytes, heads_per_kv: int, reach: int, true_bytes: int
) -> tuple[np.ndarray, np.ndarray, ByteArray]:
    """Inverse of `pack_pattern`.

    Raises:
        ValueError: if the bytes hold no pattern of this size.
    """
    row = ceil_div(reach, 8)
    size = heads_per_kv * (2 * row + true_bytes)
    try:
        found = inflate(packed, size)
    except ValueError as error:
        raise ValueError(f"frontier.bits: a pattern is damaged: {error}") from None
    bits, true = found[: 2 * heads_per_kv * row], found[2 * heads_per_kv * row :]
    bits = bits.reshape(2, heads_per_kv, row)
    refuse_padding("frontier.bits, pattern", bits, -reach % 8)
    both = np.unpackbits(bits, axis=-1, count=reach).view(bool)
    return both[0], both[1], true.reshape(heads_per_kv, true_bytes)


def inflate(packed: bytes | memoryview, size: int) -> ByteArray:
    """Inflates bytes of a known size into memory of that size, a piece at a time.

    Args:
        packed: of `zlib.compress`.
        size: bytes that they are to give.

    Returns:
        uint8 [size], writeable.

    Raises:
        ValueError: if they are damaged or of another size.
        MemoryError: if there is not so much memory.
    """
    # One byte more, so that a stream that holds more is told from one that ends.
    stream, found, at = zlib.decompressobj(), np.empty(size + 1, dtype=np.uint8), 0
    try:
        for start in range(0, len(packed), PIECE):
            rest = packed[start : start + PIECE]
            while rest and at <= size:
                part = stream.decompress(rest, min(PIECE, size + 1 - at))
                found.data[at : at + len(part)] = part
                rest, at = stream.unconsumed_tail, at + len(part)
            if stream.eof or at > size:
                break
    except zlib.error as error:
        raise ValueError(f"cannot be inflated: {error}") from None
    if at != size or not stream.eof:
        raise ValueError(f"holds another number of bytes than {size}")
    return found[:size]


class PatternPool:
    """Patterns stored once each, in the order they are first asked for."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}

    def add(self, packed: bytes) -> int:
        """The pattern's index."""
        return self._index.setdefault(packed, len(self._index))

    def arrays(self) -> dict[str, np.ndarray]:
        """`offsets` and `bits` of a `Frontier`."""
        return {
            "offsets": np.cumsum([0, *map(len, self._index)]).astype(np.int32),
            "bits": np.frombuffer(b"".join(self._index), dtype=np.uint8),
        }
