"""Rotation on CPU, into memory that layers share."""

import torch

from dam_vllm.attention.cpu.workspace import Workspace
from dam_vllm.attention.rotation import HeadRotation

# Apart from what attention takes, which reads the rotated queries.
_ROTATED = Workspace()


class CPURotation(HeadRotation):
    """Rotated queries or keys are valid until the next call, of any layer."""

    def _copy(self, vectors: torch.Tensor) -> torch.Tensor:
        (result,) = _ROTATED.take(1, vectors.shape, vectors.dtype)
        return result.copy_(vectors)
