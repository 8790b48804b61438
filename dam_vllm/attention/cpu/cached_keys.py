"""Keys in the cache, as dynamic heads score them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CachedKeys:
    """Rotated keys in the cache.

    Attributes:
        pages: [virtual pages, head_size, page], each contiguous; bytes where the cache is fp8.
        stored: dtype of an fp8 cache, else None.
    """

    pages: torch.Tensor
    stored: torch.dtype | None = None

    @property
    def page(self) -> int:
        """Tokens a page."""
        return self.pages.shape[2]

    def gather(self, channels: int, table: torch.Tensor) -> torch.Tensor:
        """Leading channels of some virtual pages: contiguous float32 [..., channels, page]."""
        flat = self.pages.flatten(1)[:, : channels * self.page]
        found = flat.index_select(0, table.flatten())
        if self.stored is not None:
            found = found.view(self.stored)
        return found.float().view(*table.shape, channels, self.page)
