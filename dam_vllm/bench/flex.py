"""The peer: torch's flex_attention, compiled, under the same page mask."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dam_vllm.masks.rounding import ceil_div

QUERY_BLOCK = 128  # rows of a block; smaller key blocks than this are named to the kernel


def flex_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scale: float,
) -> Callable[[], torch.Tensor]:
    """Attention of some queries under one page mask for all requests.

    Args:
        query: [batch, heads, queries, head_size].
        key: [batch, kv_heads, tokens, head_size].
        value: [batch, kv_heads, tokens, head_size].
        mask: see `block_mask`.
        scale: factor of the scores.

    Returns:
        A function that computes [batch, heads, queries, head_size]; the layout that flex likes
        best is made beforehand, and the compilation is the first call's.
    """
    inputs = [part.contiguous() for part in (query, key, value)]
    call = _compiled()
    page = mask.BLOCK_SIZE[1]
    options = {"BLOCK_N": page} if query.is_cuda and page < QUERY_BLOCK else None

    def step() -> torch.Tensor:
        with torch.no_grad():
            return call(
                *inputs, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options
            )

    return step


def block_mask(selected: torch.Tensor, queries: int, tokens: int, page: int) -> BlockMask:
    """Pages before a query block's first query as full blocks, later ones under the causal rule.

    Args:
        selected: bool [heads, query_blocks, pages], pages that each query block of queries reads,
            its own included; one head may stand for all.
        queries: the last ones of the request: all, in whole query blocks, or a single one.
        tokens: length of the request, a multiple of the page.
        page: tokens a page.

    Returns:
        The mask of one batch entry.
    """
    query_blocks, pages = selected.shape[1:]
    rows, earlier = ceil_div(queries, query_blocks), tokens - queries
    first = earlier + rows * torch.arange(query_blocks, device=selected.device)
    whole = (torch.arange(pages, device=selected.device) + 1) * page <= first[:, None] + 1
    return BlockMask.from_kv_blocks(
        *_blocks(selected & ~whole),
        *_blocks(selected & whole),
        BLOCK_SIZE=(rows if queries > 1 else QUERY_BLOCK, page),
        mask_mod=_causal(earlier),
        seq_lengths=(queries, tokens),
    )


def _blocks(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, heads, blocks] and indices [1, heads, blocks, pages] of the kept pages."""
    order = kept.byte().argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32)[None], order.int()[None]


@lru_cache
def _causal(earlier: int) -> Callable[..., torch.Tensor]:
    """The rule for the last queries of a request; the same object, since flex compiles for each."""

    def causal(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return query + earlier >= key

    return causal


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
