"""Selection of dynamic heads: static pages, and pages chosen for the queries at hand.

A dynamic head's query block is one page: prefixes found in the cache end at a page, so no query
block is cut by them, and every page before a query block is complete. Query blocks of one query
(decoding) and longer ones (prefill) are scored by separate code, so that neither depends on what
else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.decode import choose_decode
from dam_vllm.attention.cpu.score import span_scores
from dam_vllm.attention.cpu.span import Span
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.budget import choose
from dam_vllm.masks.rounding import ceil_div

# Rows that are scored at a time: with 1024, choosing takes up to a quarter more.
SPAN_ROWS = 2048


@dataclass(frozen=True)
class Asking:
    """A step's query blocks as they are scored.

    Attributes:
        blocks: all, cut at pages.
        pages: of the longest context.
        single: int64 [n], which are of one query.
        decode: those.
        prefill: the others by request: which, int64 [n], and the query blocks.
    """

    blocks: QueryBlocks
    pages: int
    single: torch.Tensor
    decode: QueryBlocks
    prefill: list[tuple[torch.Tensor, QueryBlocks]]

    @classmethod
    def of(cls, blocks: QueryBlocks) -> Self:
        """Sorts a step's query blocks."""
        longer = blocks.stop - blocks.start > 1
        prefill = []
        for request in blocks.request[longer].unique().tolist():
            which = ((blocks.request == request) & longer).nonzero().squeeze(1)
            prefill.append((which, blocks.take(which)))
        single = (~longer).nonzero().squeeze(1)
        return cls(blocks, int(blocks.index.max()) + 1, single, blocks.take(single), prefill)


def choose_dynamic(
    dynamic: DynamicHeads,
    query: Sequence[torch.Tensor],
    keys: CachedKeys,
    asking: Asking,
    tables: torch.Tensor,
    static: torch.Tensor,
) -> torch.Tensor:
    """Chooses pages for each query block from its queries and the cache.

    Args:
        dynamic: the layer's dynamic heads.
        query: of each dynamic head [tokens, heads_per_kv, channels], rotated; the leading channels,
            as many as any head scores with.
        keys: the cache's, these queries' own included.
        asking: the batch's query blocks.
        tables: int32 [dynamic heads, requests, pages], each head's virtual pages.
        static: bool [dynamic heads, query_blocks, pages], what the heads read anyway.

    Returns:
        bool like `static`, chosen beyond it; causal.
    """
    if not asking.prefill:
        return choose_decode(dynamic, query, keys, asking.decode, tables, static)
    chosen, single = torch.zeros_like(static), asking.single
    if len(single):
        chosen[:, single] = choose_decode(
            dynamic, query, keys, asking.decode, tables, static[:, single]
        )
    for which, blocks in asking.prefill:
        own_tables = tables[:, int(blocks.request[0])]
        for at, table in enumerate(own_tables):
            found = _choose_prefill(dynamic, at, query[at], keys, blocks, table, asking.pages)
            chosen[at, which] = found
    return chosen


def _choose_prefill(
    dynamic: DynamicHeads,
    at: int,
    query: torch.Tensor,
    keys: CachedKeys,
    query_blocks: QueryBlocks,
    table: torch.Tensor,
    pages: int,
) -> torch.Tensor:
    """Chooses pages for a request's longer query blocks, span by span of its positions.

    Where this step holds only a part of a span, or of a page, the rest is zeros.

    Returns:
        bool [query_blocks, pages].
    """
    page, heads_per_kv, channels = keys.page, query.shape[1], dynamic.channels[at]
    start, stop = int(query_blocks.start[0]), int(query_blocks.stop[-1])
    scores_of = span_scores(channels, page, query.dtype)
    size = span_tokens(page, heads_per_kv)
    unit = size if scores_of.whole_spans else page
    base, end = start // unit * unit, ceil_div(stop, unit) * unit
    row = int(query_blocks.row[0])
    asked = torch.zeros(end - base, heads_per_kv, channels)
    asked[start - base : stop - base] = query[row : row + stop - start, :, :channels]
    ids = torch.zeros(end // page, dtype=table.dtype)
    known = min(len(table), end // page)
    ids[:known] = table[:known]
    cached = keys.gather(channels, ids)
    packed = scores_of.keys(cached)
    static = dynamic.static.select(torch.arange(base // page, end // page), end // page)[0, at]
    result = torch.zeros(end // page, max(pages, end // page), dtype=torch.bool)
    for first in range(base, end, size):
        last = min(first + size, end)
        index = torch.arange(first // page, last // page)
        position = torch.arange(first, last).view(len(index), page)
        present = (position >= start) & (position < stop)
        span = Span(
            index,
            present.repeat_interleave(heads_per_kv, dim=1),
            static[index - base // page, : last // page],
        )
        rows = asked[first - base : last - base].unflatten(0, (-1, page))
        masses = scores_of.masses(rows, packed[: last // page], span, dynamic)
        result[index, : last // page] = choose(masses, [dynamic.budgets[at]])
    return result[query_blocks.index, :pages]


def span_tokens(page: int, heads_per_kv: int) -> int:
    """Tokens of queries that are scored at a time, whole pages."""
    return max(1, SPAN_ROWS // heads_per_kv // page) * page
