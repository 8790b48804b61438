"""Selection of dynamic heads: static pages, and pages chosen for the queries at hand.

A dynamic head's tile is one page: prefixes found in the cache end at a page, so no tile is cut
by them, and every page before a tile is complete. Tiles of one query (decoding) and longer ones
(prefill) are scored by separate code, so that neither depends on what else is in the batch.
"""

from dataclasses import dataclass

import torch

from dam_vllm.attention.choose import Budget, PageScores, choose
from dam_vllm.attention.plan import Tiles
from dam_vllm.attention.score import peaks_of_own_page, peaks_of_rows, peaks_of_span
from dam_vllm.attention.select import PageSelector

SPAN_ROWS = 512


@dataclass(frozen=True)
class DynamicHeads:
    """A layer's dynamic heads on one worker.

    Attributes:
        heads: local KV heads.
        ranks: leading channels that score, a head.
        budgets: a head.
        static: page tables of these heads, one layer, tiles of one page.
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
        computed: dtype that scores are computed in; bfloat16 where keys have no more digits.
        stored: dtype of an fp8 cache, whose keys are handed over as bytes; else None.
    """

    heads: list[int]
    ranks: list[int]
    budgets: list[Budget]
    static: PageSelector
    scale: float
    softcap: float = 0.0
    computed: torch.dtype = torch.float32
    stored: torch.dtype | None = None

    def logits(self, peaks: torch.Tensor) -> torch.Tensor:
        """Scaled and capped scores in float32."""
        logits = peaks.float() * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def select_dynamic(
    dynamic: DynamicHeads,
    query: torch.Tensor,
    keys: torch.Tensor,
    tiles: Tiles,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Selects the pages of each tile from its queries and the cache.

    Args:
        dynamic: the layer's dynamic heads.
        query: [dynamic heads, tokens, group, head_size], rotated.
        keys: [blocks, kv_heads, head_size, page], rotated keys of the cache, these queries' own
            included.
        tiles: the batch's queries, cut at pages.
        block_table: int32 [requests, blocks].

    Returns:
        bool [dynamic heads, tiles, pages], static and own pages included, causal.
    """
    pages = int(tiles.index.max()) + 1
    selected = dynamic.static.select(tiles.index, pages)[0]
    single = tiles.stop - tiles.start == 1
    query = query.to(dynamic.computed)
    if single.any():
        _choose_decode(dynamic, query, keys, tiles.take(single), block_table, single, selected)
    for request in tiles.request[~single].unique().tolist():
        longer = (tiles.request == request) & ~single
        mine = tiles.take(longer)
        table = block_table[request]
        for at in range(len(dynamic.heads)):
            chosen = _choose_prefill(dynamic, at, query[at], keys, mine, table, pages)
            selected[at, longer] |= chosen
    return selected


def _choose_decode(
    dynamic: DynamicHeads,
    query: torch.Tensor,
    keys: torch.Tensor,
    tiles: Tiles,
    block_table: torch.Tensor,
    single: torch.Tensor,
    selected: torch.Tensor,
) -> None:
    """Adds pages for all tiles of one query to `selected`, whose rows `single` they are."""
    own = tiles.index
    each = torch.arange(len(own))
    table = block_table[tiles.request, : selected.shape[2]]
    after = torch.arange(selected.shape[2]) >= own[:, None]
    for at, rank in enumerate(dynamic.ranks):
        cached = _gather(dynamic, at, keys, table)
        asked = query[at, tiles.row, :, :rank]
        peaks = dynamic.logits(peaks_of_rows(asked, cached))
        peaks = peaks.masked_fill(after[..., None], float("-inf"))
        place = (tiles.stop - 1) % keys.shape[3]
        mine = peaks_of_own_page(asked[:, None], cached[each, own], place)
        peaks[each, own] = dynamic.logits(mine)
        scores = PageScores(peaks, torch.ones_like(mine, dtype=torch.bool), own)
        selected[at, single] |= choose(scores, selected[at, single], dynamic.budgets[at])


def _choose_prefill(
    dynamic: DynamicHeads,
    at: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    tiles: Tiles,
    table: torch.Tensor,
    pages: int,
) -> torch.Tensor:
    """Chooses pages for a request's longer tiles, span by span of its positions.

    Spans lie at fixed positions; where this step holds only a part of one, the rest is zeros, so
    that the products keep their shape.

    Returns:
        bool [tiles, pages].
    """
    page, group, rank = keys.shape[3], query.shape[1], dynamic.ranks[at]
    start, stop = int(tiles.start[0]), int(tiles.stop[-1])
    size = max(1, SPAN_ROWS // group // page) * page
    base, end = start // size * size, -(-stop // size) * size
    row = int(tiles.row[0])
    asked = query.new_zeros(end - base, group, rank)
    asked[start - base : stop - base] = query[row : row + stop - start, :, :rank]
    ids = torch.zeros(end // page, dtype=table.dtype)
    known = min(len(table), end // page)
    ids[:known] = table[:known]
    cached = _gather(dynamic, at, keys, ids)
    by_token = cached.transpose(1, 2).contiguous()
    result = torch.zeros(end // page, max(pages, end // page), dtype=torch.bool)
    for first in range(base, end, size):
        index = torch.arange(first // page, (first + size) // page)
        rows = asked[first - base : first - base + size].view(len(index), page, group, rank)
        position = torch.arange(first, first + size)
        scores = PageScores(
            _span_logits(dynamic, rows, by_token[: index[-1] + 1], cached[index], index),
            ((position >= start) & (position < stop)).repeat_interleave(group).view(len(index), -1),
            index,
        )
        static = dynamic.static.select(index, int(index[-1]) + 1)[0, at]
        chosen = choose(scores, static, dynamic.budgets[at])
        result[index, : chosen.shape[1]] = chosen
    return result[tiles.index, :pages]


def _span_logits(
    dynamic: DynamicHeads,
    rows: torch.Tensor,
    keys: torch.Tensor,
    own_keys: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """Logits of a span's tiles, causal, own pages included.

    Args:
        dynamic: the layer's dynamic heads.
        rows: [tiles, page, group, rank].
        keys: [pages, page, rank], up to the span's end.
        own_keys: [tiles, rank, page].
        index: int64 [tiles], page of each tile.

    Returns:
        float32 [tiles, pages, page * group].
    """
    count, page, group, rank = rows.shape
    peaks = dynamic.logits(peaks_of_span(rows.view(-1, rank), keys))
    peaks = peaks.view(len(keys), count, page * group).transpose(0, 1)
    after = torch.arange(len(keys)) >= index[:, None]
    peaks = peaks.masked_fill(after[..., None], float("-inf"))
    own = peaks_of_own_page(rows, own_keys, torch.zeros_like(index))
    peaks[torch.arange(count), index] = dynamic.logits(own)
    return peaks


def _gather(
    dynamic: DynamicHeads, at: int, keys: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Leading channels of a head's keys in some pages: contiguous [..., rank, page]."""
    page, rank = keys.shape[3], dynamic.ranks[at]
    flat = keys[:, dynamic.heads[at]].flatten(1)[:, : rank * page]
    found = flat.index_select(0, table.flatten())
    if dynamic.stored is not None:
        found = found.view(dynamic.stored)
    return found.to(dynamic.computed).view(*table.shape, rank, page)
