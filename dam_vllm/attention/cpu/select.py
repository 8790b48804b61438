"""Selection of dynamic heads: static pages, and pages chosen for the queries at hand.

A dynamic head's query block is one page: prefixes found in the cache end at a page, so no query
block is cut by them, and every page before a query block is complete. Query blocks of one query
(decoding) and longer ones (prefill) are scored by separate code, so that neither depends on what
else is in the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dam_vllm.attention.cpu.score import (
    max_scores_of_own_page,
    max_scores_of_rows,
    span_scores,
)
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.budget import PageScores, choose
from dam_vllm.masks.rounding import ceil_div

SPAN_ROWS = 1024
# Numbers that decoding gathers at a time, beyond one head.
GATHERED = 1 << 23


@dataclass(frozen=True)
class CachedKeys:
    """Rotated keys in the cache.

    Attributes:
        pages: [virtual pages, head_size, page]; bytes where the cache is fp8.
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


def choose_dynamic(
    dynamic: DynamicHeads,
    query: torch.Tensor,
    keys: CachedKeys,
    query_blocks: QueryBlocks,
    tables: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses pages for each query block from its queries and the cache.

    Args:
        dynamic: the layer's dynamic heads.
        query: [dynamic heads, tokens, heads_per_kv, channels], rotated; the leading channels, as
            many as any head scores with.
        keys: the cache's, these queries' own included.
        query_blocks: the batch's queries, cut at pages.
        tables: int32 [dynamic heads, requests, pages], each head's virtual pages.

    Returns:
        Static pages, own ones among them, and those chosen beyond them, both causal: each bool
        [dynamic heads, query_blocks, pages].
    """
    pages = int(query_blocks.index.max()) + 1
    static = dynamic.static.select(query_blocks.index, pages)[0]
    chosen = torch.zeros_like(static)
    single = query_blocks.stop - query_blocks.start == 1
    if single.any():
        chosen[:, single] = _choose_decode(
            dynamic, query, keys, query_blocks.take(single), tables, static[:, single]
        )
    for request in query_blocks.request[~single].unique().tolist():
        longer = (query_blocks.request == request) & ~single
        mine = query_blocks.take(longer)
        for at in range(len(dynamic.channels)):
            table = tables[at, request]
            chosen[at, longer] = _choose_prefill(dynamic, at, query[at], keys, mine, table, pages)
    return static, chosen


def _choose_decode(
    dynamic: DynamicHeads,
    query: torch.Tensor,
    keys: CachedKeys,
    query_blocks: QueryBlocks,
    tables: torch.Tensor,
    static: torch.Tensor,
) -> torch.Tensor:
    """Chooses pages for query blocks of one query, beyond bool [heads, query_blocks, pages]."""
    chosen = torch.empty_like(static)
    size = static[0].numel() * keys.page
    for heads in _scored_together(dynamic.channels, size):
        channels, count = dynamic.channels[heads[0]], len(heads)
        own, place = (
            each.repeat(count) for each in (query_blocks.index, (query_blocks.stop - 1) % keys.page)
        )
        table = tables[heads][:, query_blocks.request, : static.shape[2]].flatten(0, 1)
        cached = keys.gather(channels, table)
        asked = query[heads][:, query_blocks.row, :, :channels].flatten(0, 1).float()
        each = torch.arange(len(own))
        max_scores = max_scores_of_rows(asked, cached)
        max_scores[own, each] = max_scores_of_own_page(asked[:, None], cached[each, own], place)
        after = torch.arange(static.shape[2])[:, None] > own
        logits = dynamic.logits(max_scores).masked_fill_(after[..., None], float("-inf"))
        budgets = [dynamic.budgets[head] for head in heads]
        found = choose(PageScores(logits, None, own), static[heads].flatten(0, 1), budgets)
        chosen[heads] = found.view(count, -1, static.shape[2])
    return chosen


def _scored_together(channels: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Heads whose keys' leading channels, as many for all, are gathered at a time.

    Args:
        channels: of each head.
        tokens: whose keys are gathered for each.
    """
    for count in dict.fromkeys(channels):
        alike = [head for head, each in enumerate(channels) if each == count]
        step = max(1, GATHERED // (tokens * count))
        for first in range(0, len(alike), step):
            yield alike[first : first + step]


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

    Spans lie at fixed positions; where this step holds only a part of one, the rest is zeros, so
    that the products keep their shape.

    Returns:
        bool [query_blocks, pages].
    """
    page, heads_per_kv, channels = keys.page, query.shape[1], dynamic.channels[at]
    start, stop = int(query_blocks.start[0]), int(query_blocks.stop[-1])
    size = span_tokens(page, heads_per_kv)
    base, end = start // size * size, ceil_div(stop, size) * size
    row = int(query_blocks.row[0])
    asked = torch.zeros(end - base, heads_per_kv, channels)
    asked[start - base : stop - base] = query[row : row + stop - start, :, :channels]
    ids = torch.zeros(end // page, dtype=table.dtype)
    known = min(len(table), end // page)
    ids[:known] = table[:known]
    cached = keys.gather(channels, ids)
    scores_of = span_scores(channels, page, query.dtype)
    packed = scores_of.keys(cached)
    static = dynamic.static.select(torch.arange(base // page, end // page), end // page)[0, at]
    result = torch.zeros(end // page, max(pages, end // page), dtype=torch.bool)
    for first in range(base, end, size):
        index = torch.arange(first // page, (first + size) // page)
        rows = asked[first - base : first - base + size].view(
            len(index), page, heads_per_kv, channels
        )
        max_scores = scores_of.max_scores(rows.view(-1, channels), packed[: index[-1] + 1])
        logits = dynamic.logits(max_scores).view(-1, len(index), page * heads_per_kv)
        own = max_scores_of_own_page(rows, cached[index], torch.zeros_like(index))
        _hide_later_pages(logits, dynamic.logits(own))
        position = torch.arange(first, first + size).view(len(index), page)
        present = (position >= start) & (position < stop)
        scores = PageScores(
            logits, None if present.all() else present.repeat_interleave(heads_per_kv, dim=1), index
        )
        mine = static[index - base // page, : len(logits)]
        result[index, : len(logits)] = choose(scores, mine, [dynamic.budgets[at]])
    return result[query_blocks.index, :pages]


def span_tokens(page: int, heads_per_kv: int) -> int:
    """Tokens of queries that are scored at a time, whole pages."""
    return max(1, SPAN_ROWS // heads_per_kv // page) * page


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
