"""The oracle: dense attention under an explicit mask, in float32, written plainly."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import query_block_size
from dam_vllm.masks.rule import allowed, token_mask
from dam_vllm.masks.tails import SPAN


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    tails: Sequence[int] = (),
    page: int = 1,
) -> torch.Tensor:
    """Softmax attention over the keys that a mask allows.

    Args:
        query: [queries, heads, head_size].
        key: [keys, kv_heads, head_size]; query heads are grouped evenly over KV heads.
        value: [keys, kv_heads, head_size].
        mask: bool [heads, queries, keys]; every row must allow a key.
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.
        tails: KV heads whose spans of which nothing is allowed count as their mean
            (`dam_vllm.masks.tails`).
        page: tokens a page, of which spans are made.

    Returns:
        float32 [queries, heads, head_size].
    """
    heads_per_kv = query.shape[1] // key.shape[1]
    span = -(-SPAN // page) * page
    spans = len(key) // span
    key_means, value_means = (
        each[: spans * span].float().reshape(spans, span, *each.shape[1:]).mean(dim=1)
        for each in (key, value)
    )
    keys = torch.cat([key.float(), key_means]).repeat_interleave(heads_per_kv, dim=1)
    values = torch.cat([value.float(), value_means]).repeat_interleave(heads_per_kv, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores[..., len(key) :] += math.log(span)
    mask = torch.cat([mask, _tail_mask(mask, heads_per_kv, tails, page, span)], dim=-1)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def _tail_mask(
    mask: torch.Tensor, heads_per_kv: int, tails: Sequence[int], page: int, span: int
) -> torch.Tensor:
    """Spans that count as their mean: bool [heads, queries, spans]."""
    heads, queries, keys = mask.shape
    result = torch.zeros(heads, queries, keys // span, dtype=torch.bool)
    for row in range(queries):
        own = (keys - queries + row) // page * page
        for at in range(own // span):
            unread = ~mask[:, row, at * span : (at + 1) * span].any(dim=1)
            for head in tails:
                members = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
                result[members, row, at] = unread[members]
    return result


def page_mask(
    masks: MaskSet,
    layer: int,
    start: int,
    stop: int,
    page: int,
    dense_below: int = 0,
    query_block: int | None = None,
) -> np.ndarray:
    """The mask that serving by pages amounts to, by its definition.

    A page is seen by all of a query block's queries, in all of a KV head's query heads, if any of
    them may see any of its keys; the first page and the query block's own pages always are.

    Args:
        masks: the mask set.
        layer: global layer index.
        start: first query position.
        stop: one past the last query position.
        page: tokens a page.
        dense_below: query positions below it (rounded up to static query blocks) are dense.
        query_block: tokens a query block, or None for that of static heads.

    Returns:
        bool [heads, stop - start, stop], causal.
    """
    dense_below = -(-dense_below // query_block_size(page)) * query_block_size(page)
    query_block = query_block or query_block_size(page)
    heads_per_kv = masks.heads // masks.kv_heads
    result = np.zeros((masks.heads, stop - start, stop), dtype=bool)
    for first in range(start // query_block * query_block, stop, query_block):
        rows = slice(max(first, start) - start, min(first + query_block, stop) - start)
        seen = allowed(masks, layer, first, first + query_block).any(axis=1)
        seen = np.asarray(seen.reshape(masks.kv_heads, heads_per_kv, -1, page).any(axis=(1, 3)))
        seen[:, [0, *range(first // page, (first + query_block) // page)]] = True
        seen[masks.modes[layer] == HeadMode.DENSE] = True
        if first < dense_below:
            seen[:] = True
        keys = seen.repeat(page, axis=1).repeat(heads_per_kv, axis=0)[:, :stop]
        result[:, rows, : keys.shape[1]] = keys[:, None]
    return result & (np.arange(stop)[None] <= np.arange(start, stop)[:, None])


def chosen_mask(
    masks: MaskSet,
    layer: int,
    head: int,
    query: torch.Tensor,
    key: torch.Tensor,
    static: np.ndarray,
    page: int,
    scale: float,
    softcap: float = 0.0,
) -> np.ndarray:
    """What one dynamic KV head's queries choose, by its definition, page of queries by page.

    A head that reuses another's pages reads its own static ones and these of its anchor.

    Args:
        masks: the mask set.
        layer: global layer index.
        head: KV head.
        query: [queries, heads_per_kv, head_size], rotated; the last queries of the sequence.
        key: [keys, head_size], rotated.
        static: bool [queries, keys], causal mask of the pages read anyway, query blocks of one
            page.
        page: tokens a page.
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.

    Returns:
        bool [queries, keys], causal; nothing of the static pages.
    """
    assert masks.dynamic is not None
    channels = int(masks.dynamic.channels[layer, head])
    logits = (
        torch.einsum("qgr,kr->qgk", query.float()[..., :channels], key.float()[:, :channels])
        * scale
    )
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    result = np.zeros_like(static)
    start = len(key) - len(query)
    for own in range(start // page, -(-len(key) // page)):
        positions = range(max(start, own * page), min(len(key), (own + 1) * page))
        max_scores = np.full((own + 1, len(positions), query.shape[1]), -np.inf)
        for row, position in enumerate(positions):
            seen = np.full((query.shape[1], (own + 1) * page), -np.inf)
            seen[:, : position + 1] = logits[position - start, :, : position + 1]
            max_scores[:, row] = seen.reshape(-1, own + 1, page).max(axis=2).T
        read = static[positions[-1] - start, : (own + 1) * page : page]
        mass = np.exp(max_scores - max_scores.max(axis=0))
        mass /= mass.sum(axis=0)
        for each in _chosen(masks, layer, head, mass, read, page):
            result[positions[0] - start : positions[-1] + 1 - start, each * page :][:, :page] = True
    return result & (np.arange(len(key)) <= np.arange(start, len(key))[:, None])


def _chosen(
    masks: MaskSet, layer: int, head: int, mass: np.ndarray, read: np.ndarray, page: int
) -> list[int]:
    """Pages that a query block chooses, of equal ones all; mass [pages, queries, heads_per_kv]."""
    assert masks.dynamic is not None
    kind, budget = masks.dynamic.kinds[layer, head], float(masks.dynamic.budgets[layer, head])
    floor, cap = masks.dynamic.floors[layer, head], masks.dynamic.caps[layer, head]
    best = mass.max(axis=(1, 2))
    others = [each for each in np.argsort(-best) if not read[each] and best[each] > 0]
    if kind == BudgetKind.TOP_P:
        kept, count = mass[read].sum(axis=0), 0
        while count < len(others) and (kept < budget - 1e-6).any():
            kept += mass[others[count]]
            count += 1
    elif kind == BudgetKind.SHARE:
        count = int(np.ceil(budget * len(mass) - 1e-6))
    else:
        count = int(np.ceil(budget / page))
    floor, cap = -(-floor // page), -(-cap // page)
    count = min(max(count, floor), max(cap, floor), len(others))
    return [each for each in others if count and best[each] >= best[others[count - 1]]]


def exact_mask(
    masks: MaskSet, layer: int, start: int, stop: int, page: int, dense_below: int = 0
) -> np.ndarray:
    """The token-exact mask: the rule itself, the first token, the query's own token.

    Args:
        masks: the mask set.
        layer: global layer index.
        start: first query position.
        stop: one past the last query position.
        page: tokens a page.
        dense_below: query positions below it (rounded up to static query blocks) are dense.

    Returns:
        bool [heads, stop - start, stop], causal.
    """
    dense_below = -(-dense_below // query_block_size(page)) * query_block_size(page)
    result = token_mask(masks, layer, start, stop)
    heads_per_kv = masks.heads // masks.kv_heads
    result[np.repeat(masks.modes[layer] == HeadMode.DENSE, heads_per_kv)] = True
    result[:, : max(0, min(stop, dense_below) - start)] = True
    return result & (np.arange(stop)[None] <= np.arange(start, stop)[:, None])
