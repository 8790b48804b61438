"""Means of spans: written in the step that holds a span's last token, beside the cache.

A mean lies at the virtual page of its span's last page. Pages that prefix caching finds bring it
along: whatever comes before them is the same.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.masks.tails import span_pages


@dataclass(frozen=True)
class EndedSpans:
    """Spans whose last tokens are queries of a step.

    Attributes:
        request: int64 [n, 1], rows of the batch.
        pages: int64 [n, pages a span], of the request.
    """

    request: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def of(cls, step: Step, page: int) -> Self | None:
        """Those of a step, or None without any."""
        each = span_pages(page)
        stop = step.seq_lens.numpy().astype(np.int64)
        first = (stop - np.diff(step.query_start_loc.numpy())) // (each * page)
        counts = stop // (each * page) - first
        if not counts.any():
            return None
        request = np.repeat(np.arange(len(counts)), counts)
        span = first[request] + np.arange(len(request)) - (counts.cumsum() - counts)[request]
        pages = span[:, None] * each + np.arange(each)
        return cls(torch.from_numpy(request)[:, None], torch.from_numpy(pages))


@dataclass(frozen=True)
class SpanMeans:
    """Means of the spans in caches of some layers.

    Attributes:
        layout: of the caches.
    """

    layout: KVLayout
    _held: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Means beside a cache: mean keys and then mean values, in a dtype, not scaled if fp8.

        Args:
            cache: [blocks, kv_heads, page, 2 * head_size].
            dtype: the model's.

        Returns:
            [virtual pages, 2 * head_size]; what was not written is undefined.
        """
        shape = (cache.shape[0] * cache.shape[1], cache.shape[3])
        held = self._held.get(cache.data_ptr())
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self._held[cache.data_ptr()] = torch.empty(shape, dtype=dtype)
        return held

    def write(self, cache: torch.Tensor, spans: torch.Tensor, dtype: torch.dtype) -> None:
        """Writes means of spans, whose tokens are in the cache.

        Args:
            cache: as for `of`.
            spans: int [n, pages a span], virtual pages.
            dtype: as for `of`.
        """
        page, width = cache.shape[2:]
        pages = cache.view(-1, page * width).index_select(0, spans.flatten())
        if self.layout.stored is not None:
            pages = pages.view(self.layout.stored)
        keys, values = pages.float().view(*spans.shape, 2, -1).unbind(2)
        sums = (
            _added(keys.unflatten(2, (width // 2, page)), 3),
            _added(values.unflatten(2, (page, width // 2)), 2),
        )
        means = torch.cat([_added(each, 1) for each in sums], dim=1) / (spans.shape[1] * page)
        self.of(cache, dtype).index_copy_(0, spans[:, -1].long(), means.to(dtype))


def _added(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a dimension, in pairs: torch orders by how many sums it makes."""
    while (count := parts.shape[dim]) > 1:
        half = count // 2
        first, second, rest = parts.split((half, half, count % 2), dim)
        parts = torch.cat([first + second, rest], dim) if count % 2 else first + second
    return parts.squeeze(dim)
