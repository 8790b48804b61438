"""Streaming masks of a wanted density, made in memory without a model."""

from dataclasses import replace

import numpy as np

from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.mask_set import Header, HeadMode, MaskSet, pack_lower
from dam_vllm.masks.page_tables import query_block_size
from dam_vllm.masks.rounding import ceil_div


def window_pages(length: int, page: int, density: float) -> int:
    """Finds the number of window pages before the query block that comes nearest to a density.

    Args:
        length: prompt length in tokens.
        page: tokens a page.
        density: pages read over pages of dense causal attention, between 0 and 1.

    Returns:
        Pages from 0 on; each query block reads the first page, these, and its own.
    """
    own = query_block_size(page) // page
    causal = (np.arange(ceil_div(length, query_block_size(page))) + 1) * own
    pages = np.arange(causal[-1] - own + 1)
    read = np.minimum(causal[None], own + 1 + pages[:, None]).sum(axis=1)
    return int(np.abs(read / causal.sum() - density).argmin())


def streaming_masks(kv_heads: int, pages: int, page: int, group: int = 1) -> MaskSet:
    """One layer whose heads all read the first token and a window of whole pages.

    Args:
        kv_heads: KV heads.
        pages: pages of the window before a query block's own.
        page: tokens a page.
        group: query heads a KV head; one is enough where all of a group are the same.

    Returns:
        The mask set, with a fingerprint that fits no model.
    """
    window = pages * page + 1
    index = np.arange(window)
    heads = kv_heads * group
    return MaskSet(
        columns=np.tile(index == 0, (1, heads, 1)),
        diagonals=np.ones((1, heads, window), dtype=bool),
        true_bits=np.tile(pack_lower(np.ones((1, 1), dtype=bool)), (1, heads, 1)),
        modes=np.full((1, kv_heads), HeadMode.STATIC, dtype=np.uint8),
        header=Header(
            kind="streaming",
            model="benchmark",
            fingerprint=Fingerprint(config="benchmark"),
            layer_types=["full"],
            pcl=1,
            reach=window,
            parameters={"sinks": 1, "window": window},
        ),
    )


def dynamic_masks(kv_heads: int, group: int, head_size: int, channels: int, tokens: int) -> MaskSet:
    """One layer whose heads all read the first page, their own, and pages that they choose.

    Args:
        kv_heads: KV heads.
        group: query heads a KV head.
        head_size: channels a head.
        channels: leading channels that score.
        tokens: tokens chosen, rounded up to pages.

    Returns:
        The mask set, with a fingerprint that fits no model.
    """
    masks = streaming_masks(kv_heads, 0, 1, group)
    return with_dynamic_heads(masks, kv_heads, head_size, channels, tokens)


def with_dynamic_heads(
    masks: MaskSet, count: int, head_size: int, channels: int, tokens: int
) -> MaskSet:
    """Lets the first KV heads of every layer choose pages beside those that they read anyway.

    Args:
        masks: the mask set.
        count: KV heads of each layer that choose.
        head_size: channels a head.
        channels: leading channels that score; the basis is the identity, which costs the same.
        tokens: tokens chosen, rounded up to pages.

    Returns:
        The mask set.
    """
    shape = masks.modes.shape
    dynamic = Dynamic(
        rotations=np.tile(np.eye(head_size, dtype=np.float32), (*shape, 1, 1)),
        channels=np.full(shape, channels, dtype=np.int32),
        kinds=np.full(shape, BudgetKind.TOP_K, dtype=np.uint8),
        budgets=np.full(shape, tokens, dtype=np.float32),
        floors=np.zeros(shape, dtype=np.int32),
        caps=np.full(shape, tokens, dtype=np.int32),
        expected=np.zeros(shape, dtype=np.float32),
    )
    modes = masks.modes.copy()
    modes[:, :count] = HeadMode.DYNAMIC
    return replace(masks, modes=modes, dynamic=dynamic if count else None)
