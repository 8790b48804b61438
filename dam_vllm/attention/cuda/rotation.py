"""Rotation of queries on a GPU: one launch, in place of a copy that attention needs anyway.

In decoding that is the one out of the fused projection, heads that are not dynamic included; in
prefill with FlashAttention the one that lays heads one after the other.

Keys are turned where they are stored (`dam_vllm.attention.cuda.store`).

Queries of an fp8 cache are quantised by the same launch, as vLLM does where it may (QuantFP8): it
cannot before a rotation.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
import triton
import triton.language as tl

from dam_vllm.attention.rotation import HeadRotation
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.sharding import Shard

# Tokens a program, and channels that are multiplied at a time: both fit any GPU's shared memory.
BLOCK, CHUNK = 32, 32
# The largest number of float8_e4m3fn.
FP8_MAX = tl.constexpr(448.0)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class DeviceRotation(HeadRotation):
    """The same as `HeadRotation`; a token's result does not depend on how many others there are."""

    _row_of: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_layer(
        cls, masks: MaskSet, layer: int, shard: Shard, device: torch.device | str = "cpu"
    ) -> Self | None:
        """See `HeadRotation.of_layer`; nothing is left to be made while a graph is captured."""
        made = super().of_layer(masks, layer, shard, device)
        if made is not None:
            made.rows(shard.heads)
        return made

    def queries(
        self, query: torch.Tensor, kv_heads: int, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `HeadRotation.queries`; quantised to float8_e4m3fn over `scale` where there is one.

        Args:
            query: [tokens, heads, head_size], the last dimension contiguous.
            kv_heads: KV heads.
            scale: float32, one number, or None.
        """
        dtype = query.dtype if scale is None else torch.float8_e4m3fn
        output = torch.empty(query.shape, dtype=dtype, device=query.device)
        heads_per_kv = query.shape[1] // kv_heads
        _launch(query, output, heads_per_kv, self.rotations, self.rows(kv_heads), scale)
        return output

    def gather(self, query: torch.Tensor, heads: torch.Tensor, target: torch.Tensor) -> None:
        """Copies some KV heads' queries, head after head, those of dynamic ones rotated.

        Args:
            query: [tokens, heads, head_size], the last dimension contiguous.
            heads: int32 [n], KV heads.
            target: [n, tokens, heads_per_kv, head_size], contiguous, written.
        """
        heads_per_kv = target.shape[2]
        rows = self.rows(query.shape[1] // heads_per_kv)
        _launch(query, target, heads_per_kv, self.rotations, rows, None, heads)

    def rows(self, kv_heads: int) -> torch.Tensor:
        """Which rotation each KV head has, -1 for none; made once."""
        if kv_heads not in self._row_of:
            rows = torch.full((kv_heads,), -1, dtype=torch.int32)
            rows[self.heads.cpu()] = torch.arange(len(self.heads), dtype=torch.int32)
            self._row_of[kv_heads] = rows.to(self.heads.device)
        return self._row_of[kv_heads]


def quantise(query: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Queries of a layer without dynamic heads in float8_e4m3fn, over `scale`: one launch.

    Args:
        query: [tokens, heads, head_size], the last dimension contiguous.
        scale: float32, one number.
    """
    output = torch.empty(query.shape, dtype=torch.float8_e4m3fn, device=query.device)
    _launch(query, output, 1, None, None, scale)
    return output


def _launch(
    vectors: torch.Tensor,
    output: torch.Tensor,
    heads_per_kv: int,
    rotations: torch.Tensor | None,
    rows: torch.Tensor | None,
    scale: torch.Tensor | None,
    gathered: torch.Tensor | None = None,
) -> None:
    """Rotates [tokens, heads, head_size] where there are rotations, quantises over a scale.

    The output is like the vectors, or [n, tokens, heads_per_kv, head_size] of gathered KV heads.
    """
    tokens, heads, size = vectors.shape
    if gathered is not None:
        heads = len(gathered) * heads_per_kv
    _rotate[(triton.cdiv(tokens, BLOCK), heads)](
        vectors, output, rotations, rows, scale, gathered, *vectors.stride()[:2], tokens,
        HEADS_PER_KV=heads_per_kv, SIZE=size, SIZE_PADDED=max(16, triton.next_power_of_2(size)),
        BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip


# Scales and lists of heads lie anywhere.
@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["scale_ptr", "gathered_ptr"],
)
def _rotate(
    vector_ptr, output_ptr, rotation_ptr, row_ptr, scale_ptr, gathered_ptr,
    in_token, in_head, tokens,
    HEADS_PER_KV: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    number = tl.program_id(1)
    channel = tl.arange(0, SIZE_PADDED)
    held = (token < tokens)[:, None] & (channel < SIZE)[None, :]
    kv_head, member = number // HEADS_PER_KV, number % HEADS_PER_KV
    if gathered_ptr is None:
        place = token * tl.num_programs(1) + number
    else:
        place = (kv_head * tokens + token) * HEADS_PER_KV + member
        kv_head = tl.load(gathered_ptr + kv_head)
    target = output_ptr + place[:, None] * SIZE + channel[None, :]
    source = vector_ptr + (kv_head * HEADS_PER_KV + member) * in_head + token[:, None] * in_token
    if row_ptr is None:
        _store(target, tl.load(source + channel[None, :], mask=held), held, scale_ptr)
    else:
        row = tl.load(row_ptr + kv_head)
        if row < 0:
            _store(target, tl.load(source + channel[None, :], mask=held), held, scale_ptr)
        else:
            basis_ptr = rotation_ptr + row * SIZE * SIZE
            vectors = turned(source, basis_ptr, token < tokens, SIZE, SIZE_PADDED, BLOCK, CHUNK)
            _store(target, vectors, held, scale_ptr)


@triton.jit
def turned(
    source, basis_ptr, present,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A block of tokens, where they are present, over a basis: float32 [BLOCK, SIZE_PADDED]."""
    channel = tl.arange(0, SIZE_PADDED)
    result = tl.zeros([BLOCK, SIZE_PADDED], tl.float32)
    for first in range(0, SIZE, CHUNK):
        inner = first + tl.arange(0, CHUNK)
        vectors = tl.load(
            source + inner[None, :], mask=present[:, None] & (inner < SIZE)[None, :], other=0.0
        ).to(tl.float32)
        basis = tl.load(
            basis_ptr + inner[:, None] * SIZE + channel[None, :],
            mask=(inner < SIZE)[:, None] & (channel < SIZE)[None, :],
            other=0.0,
        )
        result += tl.dot(vectors, basis, input_precision="ieee")
    return result


@triton.jit
def _store(target, vectors, held, scale_ptr):
    """Stores vectors in the target's dtype; where there is a scale, over it in float8_e4m3fn."""
    if scale_ptr is not None:
        vectors = to_fp8(vectors.to(tl.float32) * (1.0 / tl.load(scale_ptr)))
    tl.store(target, vectors.to(target.dtype.element_ty), mask=held)


@triton.jit
def to_fp8(numbers):
    """The nearest float8_e4m3fn of float32 numbers; what is too large becomes the largest one."""
    numbers = tl.minimum(tl.maximum(numbers, -FP8_MAX), FP8_MAX)
    if INTERPRETED:
        # The interpreter loses the carry of a mantissa that is rounded up, and so half the number.
        bits = numbers.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (numbers + 24576.0) - 24576.0  # multiples of the smallest number, 2 ** -9
        rounded = bits.to(tl.float32, bitcast=True)
        numbers = tl.where(tl.abs(numbers) < 0.015625, small, rounded)
    return numbers.to(tl.float8e4nv)
