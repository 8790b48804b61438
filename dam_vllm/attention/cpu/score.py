"""Page scores: the largest token score of each page, in the leading channels of a basis.

Queries and keys are rotated into the head's calibrated basis, so that their leading channels
hold most of every score (Loki, arXiv 2406.02542). Matrix products have the same shape and place
for a query whatever else is in the batch, so that scores do not depend on it.
"""

from typing import Protocol

import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.page_max import CompiledScores
from dam_vllm.attention.cpu.span import Span
from dam_vllm.attention.cpu.workspace import WORKSPACE
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.masks.budget import PageMasses

# Keys whose scores lie in the cache between product and maximum. On an EPYC of the third generation
# (AVX2), for 1024 rows, 16 channels and 4096 keys on one core: 4.0 ms with 512, 4.6 with 256, 5.0
# with 128, 6.7 with 4096; 3.3 for the product alone.
KEY_BLOCK = 512


class SpanScores(Protocol):
    """Scores pages for many rows over the same keys: prefill.

    Attributes:
        whole_spans: whether a row's rounding depends on how many rows there are, so that spans
            must lie at fixed positions and be filled up.
    """

    whole_spans: bool

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys, float32 [pages, channels, page], as they are taken below, pages first."""

    def max_scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The largest score of each row of float32 [rows, channels] in each page."""

    def masses(
        self, query: torch.Tensor, keys: torch.Tensor, span: Span, dynamic: DynamicHeads
    ) -> PageMasses:
        """Shares of attention mass.

        Args:
            query: float32 [query_blocks, page, heads_per_kv, channels].
            keys: of all pages up to the span's last own one.
            span: the query blocks.
            dynamic: how scores are scaled and capped.
        """


def span_scores(channels: int, page: int, dtype: torch.dtype) -> SpanScores:
    """What scores queries of a dtype in so many channels: compiled where that can be had."""
    return CompiledScores.of(channels, page, dtype) if llvm.compiles() else TorchScores()


class TorchScores:
    """By torch's products and maxima."""

    whole_spans = True

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        return keys

    def max_scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Float32 [pages, rows]."""
        (pages, channels, page), rows = keys.shape, len(query)
        block = max(1, KEY_BLOCK // page)
        transposed = query.t().contiguous()
        result = query.new_empty(pages, rows)
        # Fresh memory would cost as much as the product itself.
        (scratch,) = WORKSPACE.take(1, (block * page, rows), torch.float32)
        for start in range(0, pages, block):
            tokens = keys[start : start + block].transpose(1, 2).reshape(-1, channels)
            scores = scratch[: len(tokens)]
            torch.mm(tokens, transposed, out=scores)
            torch.amax(scores.view(-1, page, rows), dim=1, out=result[start : start + block])
        return result

    def masses(
        self, query: torch.Tensor, keys: torch.Tensor, span: Span, dynamic: DynamicHeads
    ) -> PageMasses:
        scores = self.max_scores(query.flatten(0, 2), keys)
        logits = dynamic.logits(scores).view(-1, *span.present.shape)
        own = max_scores_of_own_page(query, keys[span.index])
        _hide_later_pages(logits, dynamic.logits(own))
        # A span has as many rows whatever the batch, so that softmax, eight times as fast as
        # `page_mass`, rounds the same.
        mass = logits.softmax(dim=0).masked_fill_(~span.present, 0.0)
        return PageMasses.of(mass, span.static, span.index)


def _hide_later_pages(logits: torch.Tensor, own: torch.Tensor) -> None:
    """Puts a span's causal scores of its own pages in, and -inf behind them.

    Args:
        logits: [pages, query_blocks, rows], the query blocks' own pages last.
        own: [query_blocks, rows].
    """
    count = logits.shape[1]
    last = logits[-count:]
    later = torch.ones(count, count, dtype=torch.bool).tril(-1)
    last.masked_fill_(later[..., None], float("-inf"))
    each = torch.arange(count)
    last[each, each] = own


def max_scores_of_own_page(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores each query block's own page, causally.

    Args:
        query: float32 [query_blocks, page, heads_per_kv, channels].
        keys: float32 [query_blocks, channels, page], the page that holds the query block.

    Returns:
        [query_blocks, page * heads_per_kv].
    """
    page, heads_per_kv = query.shape[1:3]
    scores = torch.matmul(query.flatten(1, 2), keys)
    row = torch.arange(page).repeat_interleave(heads_per_kv)
    return scores.masked_fill_(torch.arange(page) > row[:, None], float("-inf")).amax(-1)
