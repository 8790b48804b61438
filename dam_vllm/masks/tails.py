"""The tail of a KV head: what stands for pages that it does not read.

A *span* is SPAN tokens of whole pages at a fixed place. One that ends before a query's own page and
of which the query reads nothing counts as one token, its mean key and mean value, as often as it
has tokens: its score has the logarithm of that number added, a lower bound of what the span weighs
(Jensen). Numerator and denominator of unread tokens from summaries: arXiv 2604.05438.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dam_vllm.masks.rounding import ceil_div

SPAN = 128
"""Tokens; more where a page has more. Spans of 32 to 256 measure alike (docs/benchmarks.md)."""

Pages = TypeVar("Pages", npt.NDArray[np.bool_], torch.Tensor)


def span_pages(page: int) -> int:
    """Pages of a span, of `page` tokens each."""
    return ceil_div(SPAN, page)


def unread_spans(read: Pages, own: Pages, page: int) -> Pages:
    """Spans that the tail stands for.

    Args:
        read: bool [..., queries, pages], pages that each query, or query block, reads.
        own: int [queries], the page of each, or of its first query.
        page: tokens a page.

    Returns:
        bool [..., queries, spans], up to the last whole span of these pages.
    """
    each = span_pages(page)
    spans = read.shape[-1] // each
    any_read = read[..., : spans * each].reshape(*read.shape[:-1], spans, each).any(-1)
    past = np.arange(1, spans + 1) * each
    ends = torch.from_numpy(past) if isinstance(own, torch.Tensor) else past
    return ~any_read & (ends <= own[:, None])
