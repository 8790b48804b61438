"""Rotation of queries and keys into the calibrated bases: attention itself does not change."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard

BLOCK = 32


def rotate(vectors: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Multiplies each head's vectors by its rotation, in float32.

    Blocks of the same number of rows are multiplied, so that a token's result does not depend on
    how many others there are.

    Args:
        vectors: [tokens, heads, head_size].
        rotations: float32 [heads, head_size, head_size].

    Returns:
        Contiguous [heads, tokens, head_size] in the dtype of `vectors`.
    """
    tokens, heads, size = vectors.shape
    blocks = ceil_div(tokens, BLOCK)
    padded = pad(vectors.transpose(0, 1).float(), (0, 0, 0, blocks * BLOCK - tokens))
    turned = torch.matmul(padded.view(heads, blocks, BLOCK, size), rotations[:, None])
    return turned.view(heads, -1, size)[:, :tokens].to(vectors.dtype).contiguous()


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
    ) -> "HeadRotation | None":
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
        turned = rotate(key[:, self.heads], self.rotations)
        return key.index_copy(1, self.heads, turned.transpose(0, 1))

    def queries(self, query: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Queries [tokens, heads, head_size] with those of dynamic KV heads rotated."""
        grouped = query.view(len(query), kv_heads, -1, query.shape[-1])
        heads_per_kv = grouped.shape[2]
        asked = grouped[:, self.heads].flatten(1, 2)
        turned = rotate(asked, self.rotations.repeat_interleave(heads_per_kv, dim=0))
        turned = turned.view(len(self.heads), heads_per_kv, len(query), -1).permute(2, 0, 1, 3)
        return grouped.index_copy(1, self.heads, turned).view(query.shape)
