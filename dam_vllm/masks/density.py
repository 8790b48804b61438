"""Density: pages read over pages that dense causal attention reads."""

import numpy as np

from dam_vllm.masks.mask_set import FloatArray, HeadMode, MaskSet
from dam_vllm.masks.page_tables import PageTables, head_tables, page_tables, query_block_size
from dam_vllm.masks.rounding import ceil_div


def density(
    masks: MaskSet, lengths: list[int], page: int, dense_below: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Pages read over pages of dense causal attention, for prompts of some lengths.

    Both count whole query blocks against all pages up to the query block's end, as they are read.

    Args:
        masks: the mask set.
        lengths: prompt lengths in tokens.
        page: tokens a page.
        dense_below: positions below it are read densely.

    Returns:
        float32 [len(lengths), layers, heads] of each query head on its own, and float32
        [len(lengths), layers, kv_heads] of what is read. Layers left to vLLM count 1.
    """
    shape = (len(lengths), masks.layers)
    heads = np.ones((*shape, masks.heads), dtype=np.float32)
    kv_heads = np.ones((*shape, masks.kv_heads), dtype=np.float32)
    for layer, kind in enumerate(masks.header.layer_types):
        if kind == "full":
            measured = [_static(masks, layer, length, page, dense_below) for length in lengths]
            heads[:, layer], kv_heads[:, layer] = (
                np.stack(part) for part in zip(*measured, strict=True)
            )
            _add_choosing(masks, layer, lengths, page, dense_below, heads, kv_heads)
    return heads, kv_heads


def _static(
    masks: MaskSet, layer: int, length: int, page: int, dense_below: int
) -> tuple[FloatArray, FloatArray]:
    """Density of a layer's heads, as if each read its static pages alone."""
    tables = head_tables(masks, layer, page, query_block_size(page))
    joined = tables.join(masks.heads // masks.kv_heads)
    return _density(tables, length, dense_below), _density(joined, length, dense_below)


def _add_choosing(
    masks: MaskSet,
    layer: int,
    lengths: list[int],
    page: int,
    dense_below: int,
    heads: FloatArray,
    kv_heads: FloatArray,
) -> None:
    """Overwrites a layer's dynamic and reusing heads.

    Query heads read what their KV head reads, and a reusing head what its anchor is expected to
    choose.
    """
    modes = masks.modes[layer]
    choosing = np.flatnonzero((modes == HeadMode.DYNAMIC) | (modes == HeadMode.REUSE))
    if masks.dynamic is None or not len(choosing):
        return
    choosers: list[tuple[int, int]] = [
        masks.anchor(layer, head) if modes[head] == HeadMode.REUSE else (layer, int(head))
        for head in choosing
    ]
    tables = page_tables(masks, layer, page, query_block=page)
    for row, length in enumerate(lengths):
        causal = np.arange(ceil_div(length, page)) + 1
        read = tables.select(causal - 1, dense_below).sum(axis=2)[choosing]
        read = read + [masks.dynamic.chosen(*each, page, causal) for each in choosers]
        kv_heads[row, layer, choosing] = np.minimum(read, causal).sum(axis=1) / causal.sum()
    heads_per_kv = masks.heads // masks.kv_heads
    joined = np.repeat(kv_heads[:, layer], heads_per_kv, axis=1)
    own = np.isin(np.arange(masks.heads) // heads_per_kv, choosing)
    heads[:, layer, own] = joined[:, own]


def _density(tables: PageTables, length: int, dense_below: int) -> FloatArray:
    query_blocks = np.arange(ceil_div(length, tables.query_block))
    pages = ceil_div(length, tables.page)
    read = tables.select(query_blocks, dense_below)[:, :, :pages]
    own = tables.query_block // tables.page
    causal = np.arange(pages)[None] < (query_blocks[:, None] + 1) * own
    return np.asarray(read.sum(axis=(1, 2)) / causal.sum(), dtype=np.float32)
