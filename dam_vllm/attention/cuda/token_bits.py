"""Token-exact masks as bitmaps that kernels look up key by key."""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from dam_vllm.masks.mask_set import MaskSet


@dataclass(frozen=True)
class TokenBits:
    """A layer's masks on a worker's device; eight bits a byte, the first one highest.

    Attributes:
        columns: uint8 [heads, bytes], kept key positions.
        diagonals: uint8 [heads, bytes], kept distances.
        true: uint8 [heads, bytes], lower triangle of the true mask, row by row.
        pcl: query positions below it follow the true mask.
        reach: kept columns and distances lie below it.
        dense_below: query positions below it see every key.
    """

    columns: torch.Tensor
    diagonals: torch.Tensor
    true: torch.Tensor
    pcl: int
    reach: int
    dense_below: int

    @classmethod
    def of_layer(
        cls, masks: MaskSet, layer: int, heads: slice, dense_below: int, device: torch.device
    ) -> "TokenBits":
        """Bitmaps of some query heads.

        Args:
            masks: the mask set.
            layer: global layer index.
            heads: global query heads.
            dense_below: query positions below it see every key.
            device: where to.
        """

        def move(bits: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(bits[heads])).to(device)

        return cls(
            columns=move(np.packbits(masks.columns[layer], axis=-1)),
            diagonals=move(np.packbits(masks.diagonals[layer], axis=-1)),
            true=move(masks.true_bits[layer]),
            pcl=masks.pcl,
            reach=masks.reach,
            dense_below=dense_below,
        )


@triton.jit
def bit_at(ptr, index, mask):
    """Bits of a map that starts at `ptr`, 0 where not `mask`."""
    byte = tl.load(ptr + (index >> 3), mask=mask, other=0)
    return ((byte >> (7 - (index & 7)).to(tl.uint8)) & 1) > 0


@triton.jit
def token_visible(
    query, key, head,
    columns_ptr, diagonals_ptr, true_ptr, bytes_each, true_bytes, pcl, reach, dense_below,
):  # fmt: skip
    """The rule of `masks.rule.token_mask`, dense positions added; causality is not checked.

    `query` int32 [M, 1] and `key` int32 [1, N] are positions, `head` int32 [M, 1] query heads; for
    the rest see `TokenBits`. Gives int1 [M, N], which counts where no key lies after its query.
    """
    distance = query - key
    far = (query >= pcl) & (distance >= 0)
    map_of = head * bytes_each
    seen = bit_at(columns_ptr + map_of, key, far & (key < reach))
    seen |= bit_at(diagonals_ptr + map_of, distance, far & (distance < reach))
    near = (query < pcl) & (distance >= 0)
    seen |= bit_at(true_ptr + head * true_bytes, query * (query + 1) // 2 + key, near)
    return seen | (key == 0) | (distance == 0) | (query < dense_below)
