"""Rotation of queries and keys into the calibrated bases: attention itself does not change."""

from dataclasses import dataclass
from typing import Self

import torch

from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard

BLOCK, BLOCKS = 32, 32


def rotate(vectors: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Multiplies each head's vectors by its rotation, in float32: few rows, all heads at once.

    Blocks of the same number of rows are multiplied, here and in `rotate_into`, so that a token's
    result does not depend on how many others there are.

    Args:
        vectors: [heads, rows, size], at most BLOCK rows.
        rotations: float32 [heads, size, size].

    Returns:
        float32 [heads, rows, size].
    """
    heads, rows, size = vectors.shape
    padded = rotations.new_zeros(heads, BLOCK, size)
    padded[:, :rows] = vectors
    return torch.bmm(padded, rotations)[:, :rows]


def rotate_into(output: torch.Tensor, vectors: torch.Tensor, rotation: torch.Tensor) -> None:
    """Multiplies one head's vectors by its rotation, in float32: many rows, some blocks at a time.

    Copies and products stay in the processor's cache, and no block gets a copy of the rotation
    as `matmul` would make it: a fourth of the time at 4096 tokens, 8 heads of 128 channels.

    Args:
        output: like the vectors, written.
        vectors: [tokens, heads_per_kv, size].
        rotation: float32 [size, size].
    """
    tokens, heads_per_kv, size = vectors.shape
    at_once = min(tokens, max(1, BLOCK * BLOCKS // heads_per_kv))
    blocks = ceil_div(at_once * heads_per_kv, BLOCK)
    padded, turned = rotation.new_zeros(2, blocks, BLOCK, size)
    each = rotation.expand(blocks, size, size)
    parts = vectors.split(at_once), output.split(at_once)
    for asked, result in zip(*parts, strict=True):
        rows = len(asked) * heads_per_kv
        padded.view(-1, size)[:rows].view(asked.shape).copy_(asked)
        torch.bmm(padded, each, out=turned)
        result.copy_(turned.view(-1, size)[:rows].view(asked.shape))


@dataclass(frozen=True)
class HeadRotation:
    """Rotation of a layer's dynamic heads.

    Attributes:
        heads: int64 [n], their local ids.
        rotations: float32 [n, head_size, head_size].
    """

    heads: torch.Tensor
    rotations: torch.Tensor

    @classmethod
    def of_layer(
        cls, masks: MaskSet, layer: int, shard: Shard, device: torch.device | str = "cpu"
    ) -> Self | None:
        """Rotation of a layer's dynamic heads on one rank.

        Args:
            masks: the mask set.
            layer: global layer index.
            shard: KV heads of this rank.
            device: where queries and keys are.

        Returns:
            The rotation, or None where this rank holds no dynamic head.
        """
        local = shard.dynamic_heads(masks, layer)
        if not local or masks.dynamic is None:
            return None
        bases = masks.dynamic.rotations[layer, shard.start : shard.stop][local]
        return cls(torch.tensor(local, device=device), torch.from_numpy(bases).to(device))

    def keys(self, key: torch.Tensor) -> torch.Tensor:
        """Keys [tokens, kv_heads, head_size] with those of dynamic heads rotated."""
        return self._turned(key[:, :, None]).squeeze(2)

    def queries(self, query: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Queries [tokens, heads, head_size] with those of dynamic KV heads rotated."""
        grouped = query.view(len(query), kv_heads, -1, query.shape[-1])
        return self._turned(grouped).view(query.shape)

    def _turned(self, vectors: torch.Tensor) -> torch.Tensor:
        """A copy of [tokens, kv_heads, heads_per_kv, head_size] with dynamic heads rotated."""
        output = self._copy(vectors)
        tokens, _, heads_per_kv, _ = vectors.shape
        if tokens * heads_per_kv <= BLOCK:
            asked = vectors[:, self.heads].transpose(0, 1)
            turned = rotate(asked.flatten(1, 2), self.rotations).to(vectors.dtype)
            output[:, self.heads] = turned.reshape(asked.shape).transpose(0, 1)
        else:
            for head, rotation in zip(self.heads.tolist(), self.rotations, strict=True):
                rotate_into(output[:, head], vectors[:, head], rotation)
        return output

    def _copy(self, vectors: torch.Tensor) -> torch.Tensor:
        """A contiguous copy."""
        return vectors.clone(memory_format=torch.contiguous_format)
