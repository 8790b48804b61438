"""Rotation of queries and keys into the calibrated bases: attention itself does not change."""

import torch
from torch.nn.functional import pad

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
    blocks = -(-tokens // BLOCK)
    padded = pad(vectors.transpose(0, 1).float(), (0, 0, 0, blocks * BLOCK - tokens))
    turned = torch.matmul(padded.view(heads, blocks, BLOCK, size), rotations[:, None])
    return turned.view(heads, -1, size)[:, :tokens].to(vectors.dtype).contiguous()
