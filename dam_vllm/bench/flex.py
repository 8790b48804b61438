"""The peer: torch's flex_attention, compiled, under the same page mask."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def flex_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    page: int,
    scale: float,
) -> Callable[[], torch.Tensor]:
    """Attention of a whole prompt under one page mask for all heads.

    Args:
        query: [tokens, heads, head_size].
        key: [tokens, kv_heads, head_size].
        value: [tokens, kv_heads, head_size].
        selected: bool [tiles, pages], pages that each tile reads, its own included.
        page: tokens a page.
        scale: factor of the scores.

    Returns:
        A function that computes [1, heads, tokens, head_size]; the mask, the layout that flex
        likes best and the compilation are made beforehand.
    """
    mask = block_mask(selected, len(query), page)
    inputs = [part.transpose(0, 1)[None].contiguous() for part in (query, key, value)]
    call = _compiled()

    def step() -> torch.Tensor:
        with torch.no_grad():
            return call(*inputs, block_mask=mask, scale=scale, enable_gqa=True)

    return step


def block_mask(selected: torch.Tensor, tokens: int, page: int) -> BlockMask:
    """Pages before the tile as full blocks, the tile's own under the causal rule.

    Args:
        selected: bool [tiles, pages].
        tokens: length of the prompt, a multiple of the tile.
        page: tokens a page.

    Returns:
        The mask of one batch entry and all heads.
    """
    tiles, pages = selected.shape
    own = pages // tiles
    before = torch.arange(pages) < torch.arange(tiles)[:, None] * own
    return BlockMask.from_kv_blocks(
        *_blocks(selected & ~before),
        *_blocks(selected & before),
        BLOCK_SIZE=(tokens // tiles, page),
        mask_mod=_causal,
        seq_lengths=(tokens, tokens),
    )


def _blocks(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, 1, tiles] and indices [1, 1, tiles, pages] of the kept pages."""
    order = kept.int().argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _causal(
    batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return query >= key


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
