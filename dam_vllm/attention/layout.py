"""How vLLM's cache tensor holds keys and values: the one place that takes it apart.

A layer's cache is [blocks, kv_heads, page, 2 * head_size] with heads before tokens, so that each
(block, KV head) is a *virtual page* of a cache with a single KV head, with id
block * kv_heads + head.
"""

from dataclasses import dataclass

import torch

FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class KVLayout:
    """A cache's layout and dtype.

    Attributes:
        keys_by_channel: whether a page holds its keys channel by channel, [head_size, page], and
            then its values token by token, [page, head_size], as the CPU's plain kernels ("vec")
            do; else it holds each token's key and value side by side, as FlashAttention does.
        stored: dtype of the elements where it is not the tensor's own, as for an fp8 cache, whose
            bytes vLLM hands over; else None.
    """

    keys_by_channel: bool
    stored: torch.dtype | None = None

    def keys_and_values(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache as virtual pages, without a copy.

        Args:
            cache: [..., kv_heads, page, 2 * head_size], virtual pages in order, contiguous.

        Returns:
            Keys and values, each [virtual pages, page, head_size] in the stored dtype. Keys by
            channel lie as [head_size, page] within a page, whatever that shape says.
        """
        page, width = cache.shape[-2:]
        stored = cache if self.stored is None else cache.view(self.stored)
        if self.keys_by_channel:
            keys, values = stored.view(-1, 2 * page, width // 2).chunk(2, dim=1)
        else:
            keys, values = stored.view(-1, page, width).split(width // 2, dim=2)
        return keys, values

    def channels(self, cache: torch.Tensor) -> torch.Tensor:
        """Keys [virtual pages, head_size, page] of a cache that holds them by channel.

        Args:
            cache: as for `keys_and_values`.

        Returns:
            Without a copy, in the cache tensor's own dtype (bytes for fp8).
        """
        page, width = cache.shape[-2:]
        return cache.view(-1, 2, width // 2, page)[:, 0]

    def tokens(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values token by token, copied; slow, for oracles.

        Args:
            pages: [pages, kv_heads, page, 2 * head_size], pages of one request in order.

        Returns:
            Two tensors, each float32 [pages * page, kv_heads, head_size]; fp8 is not yet scaled.
        """
        count, kv_heads, page, width = pages.shape
        keys, values = self.keys_and_values(pages.contiguous())
        if self.keys_by_channel:
            keys = keys.reshape(-1, width // 2, page).transpose(1, 2)
        shape = (count, kv_heads, page, width // 2)
        key, value = (part.float().reshape(shape).transpose(1, 2) for part in (keys, values))
        return key.reshape(-1, kv_heads, width // 2), value.reshape(-1, kv_heads, width // 2)
