"""Means of spans, written in the step that holds a span's last token."""

from dataclasses import dataclass
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


def write_means(
    means: torch.Tensor, cache: torch.Tensor, spans: torch.Tensor, layout: KVLayout
) -> None:
    """Writes means of spans, whose tokens are in the cache; not scaled if that is fp8.

    Args:
        means: [virtual pages, 2, head_size], of `SpanMeans`, written at the spans' last pages.
        cache: [blocks, kv_heads, page, 2 * head_size], keys by channel.
        spans: int [n, pages a span], virtual pages.
        layout: of the cache.
    """
    page, width = cache.shape[2:]
    pages = cache.view(-1, page * width).index_select(0, spans.flatten())
    if layout.stored is not None:
        pages = pages.view(layout.stored)
    keys, values = pages.float().view(*spans.shape, 2, -1).unbind(2)
    sums = (
        _added(keys.unflatten(2, (width // 2, page)), 3),
        _added(values.unflatten(2, (page, width // 2)), 2),
    )
    found = torch.stack([_added(each, 1) for each in sums], dim=1) / (spans.shape[1] * page)
    means.index_copy_(0, spans[:, -1].long(), found.to(means.dtype))


def _added(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a dimension, in pairs: torch orders by how many sums it makes."""
    while (count := parts.shape[dim]) > 1:
        half = count // 2
        first, second, rest = parts.split((half, half, count % 2), dim)
        parts = torch.cat([first + second, rest], dim) if count % 2 else first + second
    return parts.squeeze(dim)
