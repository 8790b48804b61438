"""Memory that layers share for tensors which live no longer than one layer's attention.

Fresh memory costs a page fault for every 4 KiB that is first written: at 16k tokens as much
as a tenth of sparse attention itself.
"""

import torch


class Workspace:
    """One buffer that grows to the largest request and is handed out again and again."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """Hands out uninitialised tensors, valid until the next call.

        Args:
            count: tensors wanted.
            shape: of each.
            dtype: of each.

        Returns:
            Contiguous CPU tensors that do not overlap.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._buffer.numel() < count * size:
            self._buffer = torch.empty(count * size, dtype=torch.uint8)
        parts = self._buffer[: count * size].view(count, size)
        return [part.view(dtype).view(shape) for part in parts]


WORKSPACE = Workspace()
