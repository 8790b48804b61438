"""The oracle: dense attention under an explicit mask, in float32, written plainly."""

import numpy as np
import torch

from dam_vllm.masks.extension import allowed, token_mask
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.pages import tile_size


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the keys that a mask allows.

    Args:
        query: [queries, heads, head_size].
        key: [keys, kv_heads, head_size]; query heads are grouped evenly over KV heads.
        value: [keys, kv_heads, head_size].
        mask: bool [heads, queries, keys]; every row must allow a key.
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.

    Returns:
        float32 [queries, heads, head_size].
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    values = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def page_mask(
    masks: MaskSet, layer: int, start: int, stop: int, page: int, dense_below: int = 0
) -> np.ndarray:
    """The mask that serving by pages amounts to, by its definition.

    A page is seen by all of a tile's queries, in all heads of a KV head's group, if any of
    them may see any of its keys; the first page and the tile's own pages always are.

    Args:
        masks: the mask set.
        layer: global layer index.
        start: first query position.
        stop: one past the last query position.
        page: tokens a page.
        dense_below: query positions below it (rounded up to tiles) are dense.

    Returns:
        bool [heads, stop - start, stop], causal.
    """
    tile = tile_size(page)
    group = masks.heads // masks.kv_heads
    result = np.zeros((masks.heads, stop - start, stop), dtype=bool)
    for first in range(start // tile * tile, stop, tile):
        rows = slice(max(first, start) - start, min(first + tile, stop) - start)
        seen = allowed(masks, layer, first, first + tile).any(axis=1)
        seen = np.asarray(seen.reshape(masks.kv_heads, group, -1, page).any(axis=(1, 3)))
        seen[:, [0, *range(first // page, (first + tile) // page)]] = True
        seen[masks.modes[layer] == HeadMode.DENSE] = True
        if first < dense_below:
            seen[:] = True
        keys = seen.repeat(page, axis=1).repeat(group, axis=0)[:, :stop]
        result[:, rows, : keys.shape[1]] = keys[:, None]
    return result & (np.arange(stop)[None] <= np.arange(start, stop)[:, None])


def exact_mask(
    masks: MaskSet, layer: int, start: int, stop: int, dense_below: int = 0
) -> np.ndarray:
    """The token-exact mask: the rule itself, the first token, the query's own token.

    Args:
        masks: the mask set.
        layer: global layer index.
        start: first query position.
        stop: one past the last query position.
        dense_below: query positions below it are dense.

    Returns:
        bool [heads, stop - start, stop], causal.
    """
    result = token_mask(masks, layer, start, stop)
    group = masks.heads // masks.kv_heads
    result[np.repeat(masks.modes[layer] == HeadMode.DENSE, group)] = True
    result[:, : max(0, min(stop, dense_below) - start)] = True
    return result & (np.arange(stop)[None] <= np.arange(start, stop)[:, None])
