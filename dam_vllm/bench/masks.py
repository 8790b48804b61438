"""Masks of a wanted density, made in memory without calibration."""

from dataclasses import replace

import numpy as np

from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.mask_set import Header, HeadMode, MaskSet, pack_lower
from dam_vllm.masks.page_tables import query_block_size
from dam_vllm.masks.rounding import ceil_div

SEED = 2508


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


def streaming_masks(kv_heads: int, pages: int, page: int, heads_per_kv: int = 1) -> MaskSet:
    """One layer whose heads all read the first token and a window of whole pages.

    Args:
        kv_heads: KV heads.
        pages: pages of the window before a query block's own.
        page: tokens a page.
        heads_per_kv: query heads a KV head; one is enough where all of them are the same.

    Returns:
        The mask set, with a fingerprint that fits no model.
    """
    window = pages * page + 1
    index = np.arange(window)
    heads = kv_heads * heads_per_kv
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


def dynamic_masks(
    kv_heads: int, heads_per_kv: int, head_size: int, channels: int, tokens: int
) -> MaskSet:
    """One layer whose heads all read the first page, their own, and pages that they choose.

    Args:
        kv_heads: KV heads.
        heads_per_kv: query heads a KV head.
        head_size: channels a head.
        channels: leading channels that score.
        tokens: tokens chosen, rounded up to pages.

    Returns:
        The mask set, with a fingerprint that fits no model.
    """
    masks = streaming_masks(kv_heads, 0, 1, heads_per_kv)
    return with_dynamic_heads(masks, kv_heads, head_size, channels, tokens)


def scattered_masks(
    model: str, length: int, page: int, density: float, count: int, head_size: int, channels: int
) -> MaskSet:
    """Masks of one density at every length: the first page, the query block's own, and others.

    Static heads read pages at distances drawn for each KV head, dynamic ones choose as many.

    Args:
        model: folder; its configuration is read.
        length: longest request in tokens.
        page: tokens a page.
        density: pages read over pages of dense causal attention at that length, above 0 up to 1;
            at shorter ones the first page and the own ones weigh more.
        count: KV heads of each layer that choose.
        head_size: channels a head.
        channels: leading channels that score.

    Returns:
        The mask set, for any weights of that shape.
    """
    masks = streaming(model, 1, length)
    block = query_block_size(page)
    own, blocks = block // page, ceil_div(length, block)
    causal, least = own * blocks * (blocks + 1) / 2, own * blocks + blocks - 1
    # Pages that a distance in query blocks gives to read: the first page is read anyway.
    gained = own * np.arange(blocks - 1, 0, -1) - 1
    kept = np.zeros((*masks.modes.shape, blocks), dtype=bool)
    kept[..., 0] = True
    rng = np.random.default_rng(SEED)
    for layer in kept:
        for head in layer[count:]:
            order = rng.permutation(len(gained))
            read = least + np.concatenate([[0], gained[order].cumsum()])
            head[1 + order[: np.abs(read / causal - density).argmin()]] = True
    diagonals = np.zeros((masks.layers, masks.heads, blocks, block), dtype=bool)
    # A diagonal at a multiple of the query block leads to the pages of one other query block.
    diagonals[..., 0] = np.repeat(kept, masks.heads // masks.kv_heads, axis=1)
    diagonals = diagonals.reshape(masks.layers, masks.heads, -1)[..., :length]
    header = masks.header.model_copy(update={"parameters": {"density": density}})
    masks = replace(masks, diagonals=diagonals, header=header)
    # A dynamic head's query block is a page, and what it chooses is rounded up.
    pages = ceil_div(length, page)
    share = max(0.0, density - (2.5 * pages - 1) / (pages * (pages + 1) / 2))
    return with_dynamic_heads(masks, count, head_size, channels, length, (BudgetKind.SHARE, share))


def with_dynamic_heads(
    masks: MaskSet,
    count: int,
    head_size: int,
    channels: int,
    tokens: int,
    budget: tuple[BudgetKind, float] | None = None,
) -> MaskSet:
    """Lets the first KV heads of every layer choose pages beside those that they read anyway.

    Args:
        masks: the mask set.
        count: KV heads of each layer that choose.
        head_size: channels a head.
        channels: leading channels that score; the basis is the identity, which costs the same.
        tokens: most tokens chosen, rounded up to pages.
        budget: how many are chosen and what that counts, all of them unless told.

    Returns:
        The mask set.
    """
    shape = masks.modes.shape
    kind, value = budget or (BudgetKind.TOP_K, tokens)
    dynamic = Dynamic(
        rotations=np.tile(np.eye(head_size, dtype=np.float32), (*shape, 1, 1)),
        channels=np.full(shape, channels, dtype=np.int32),
        kinds=np.full(shape, kind, dtype=np.uint8),
        budgets=np.full(shape, value, dtype=np.float32),
        floors=np.zeros(shape, dtype=np.int32),
        caps=np.full(shape, tokens, dtype=np.int32),
        expected=np.zeros(shape, dtype=np.float32),
    )
    modes = masks.modes.copy()
    modes[:, :count] = HeadMode.DYNAMIC
    return replace(masks, modes=modes, dynamic=dynamic if count else None)
