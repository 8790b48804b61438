"""Selection of dynamic heads in decoding: a single query of each of several requests.

A query's result depends on nothing else in the batch, by torch neither: its products have the same
shape and place.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.last_max import LastScores
from dam_vllm.attention.cpu.llvm_text import LOADED
from dam_vllm.attention.cpu.page_mass import compiled_masses
from dam_vllm.attention.cpu.span import Span
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.budget import PageMasses, choose, page_mass

# Numbers that torch's products gather at a time, beyond one head.
GATHERED = 1 << 23


def choose_decode(
    dynamic: DynamicHeads,
    query: Sequence[torch.Tensor],
    keys: CachedKeys,
    query_blocks: QueryBlocks,
    tables: torch.Tensor,
    static: torch.Tensor,
) -> torch.Tensor:
    """Chooses pages for query blocks of one query, beyond bool [heads, query_blocks, pages].

    See `choose_dynamic`.
    """
    heads, _, pages = static.shape
    asked = torch.stack([each[query_blocks.row] for each in query]).float()
    tables = tables[:, query_blocks.request, :pages]
    masses_of = _compiled if llvm.compiles() and keys.pages.dtype in LOADED else _torch
    masses = masses_of(dynamic, asked, keys, query_blocks, tables, static.flatten(0, 1))
    return choose(masses, dynamic.budgets).view(heads, -1, pages)


def _compiled(
    dynamic: DynamicHeads,
    query: torch.Tensor,
    keys: CachedKeys,
    query_blocks: QueryBlocks,
    tables: torch.Tensor,
    static: torch.Tensor,
) -> PageMasses:
    """Shares of attention mass by compiled functions.

    Args:
        dynamic: the heads.
        query: float32 [heads, n, heads_per_kv, channels].
        keys: the cache's.
        query_blocks: n of one query.
        tables: int32 [heads, n, pages].
        static: bool [heads * n, pages].
    """
    heads, count, heads_per_kv, _ = query.shape
    scores = LastScores.of(heads_per_kv, keys.page, keys.pages.dtype)
    position = (query_blocks.stop - 1).repeat(heads)
    channels = torch.tensor(dynamic.channels).repeat_interleave(count)
    found, own = scores.max_scores(
        query.flatten(0, 1), channels, position, keys.pages, tables.flatten(0, 1)
    )
    rows = torch.arange(own.shape[1] * scores.vectors)
    present = (rows < heads_per_kv).expand(len(position), -1)
    span = Span(query_blocks.index.repeat(heads), present, static)
    return compiled_masses(found, own, span, dynamic.scale, dynamic.softcap)


def _torch(
    dynamic: DynamicHeads,
    query: torch.Tensor,
    keys: CachedKeys,
    query_blocks: QueryBlocks,
    tables: torch.Tensor,
    static: torch.Tensor,
) -> PageMasses:
    """The same by torch's products; see `_compiled`."""
    position, pages = query_blocks.stop - 1, tables.shape[2]
    parts = []
    for some in _scored_together(dynamic.channels, tables[0].numel() * keys.page):
        channels = dynamic.channels[some.start]
        rows = query[some, ..., :channels].flatten(0, 1)
        cached = keys.gather(channels, tables[some].flatten(0, 1))
        where = position.repeat(some.stop - some.start)
        parts.append(max_scores_of_last(rows, cached, where))
    own = query_blocks.index.repeat(len(query))
    after = torch.arange(pages) > own[:, None]
    logits = dynamic.logits(torch.cat(parts)).masked_fill_(after[..., None], float("-inf"))
    return PageMasses.of(page_mass(logits).transpose(0, 1), static, own)


def _scored_together(channels: Sequence[int], tokens: int) -> Iterator[slice]:
    """Neighbouring heads whose keys' leading channels, as many for all, are gathered at a time.

    Args:
        channels: of each head.
        tokens: whose keys are gathered for each.
    """
    first = 0
    for count, alike in groupby(channels):
        stop = first + len(list(alike))
        step = max(1, GATHERED // (tokens * count))
        for start in range(first, stop, step):
            yield slice(start, min(stop, start + step))
        first = stop


def max_scores_of_last(
    query: torch.Tensor, keys: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Scores pages for a single query each, that share no keys: decoding.

    Args:
        query: float32 [n, rows, channels].
        keys: float32 [n, pages, channels, page].
        position: int64 [n], of the query.

    Returns:
        [n, pages, rows], causal in the query's own page.
    """
    page = keys.shape[3]
    own, place = position // page, position % page
    scores = torch.matmul(query[:, None], keys)
    each = torch.arange(len(own))
    later = torch.arange(page) > place[:, None, None]
    scores[each, own] = scores[each, own].masked_fill_(later, float("-inf"))
    return scores.amax(-1)
