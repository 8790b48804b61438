"""What a fit could choose from, as the mask file holds it: choices from cheapest to best."""

import zlib
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from dam_vllm.masks.ranges import refuse_outside

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]

MEASURES = ("density", "cost", "kl", "top1")


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

        What the masks of a point mean is checked when they are made.

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
    row = (reach + 7) // 8
    size = heads_per_kv * (2 * row + true_bytes)
    try:
        found = inflate(packed, size)
    except ValueError as error:
        raise ValueError(f"frontier.bits: a pattern is damaged: {error}") from None
    bits, true = found[: 2 * heads_per_kv * row], found[2 * heads_per_kv * row :]
    both = np.unpackbits(bits.reshape(2, heads_per_kv, row), axis=-1, count=reach).view(bool)
    return both[0], both[1], true.reshape(heads_per_kv, true_bytes)


def inflate(packed: bytes, size: int) -> ByteArray:
    """Inflates bytes of a known size; never makes more of them.

    Raises:
        ValueError: if they are damaged or of another size.
    """
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(packed, size + 1)
    except zlib.error as error:
        raise ValueError(f"cannot be inflated: {error}") from None
    if len(found) != size or not stream.eof:
        raise ValueError(f"holds another number of bytes than {size}")
    return np.frombuffer(found, dtype=np.uint8)


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
