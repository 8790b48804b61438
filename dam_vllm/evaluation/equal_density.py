"""Sinks and a window (StreamingLLM, arXiv 2309.17453) that read as much as some masks do."""

from dataclasses import replace

import numpy as np

from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import page_tables
from dam_vllm.masks.rounding import ceil_div

SINKS = 4  # the whole first page is read anyway
TOLERANCE = 1e-3  # prompts of one length differ by up to a record


def window_density(model: str, window: int, length: int, page: int, dense_below: int) -> float:
    """Density of a prefill under sinks and a window, weighed by queries as servers count it.

    Args:
        model: folder or Hub id.
        window: latest tokens that every head reads.
        length: of the prompt in tokens.
        page: tokens a page.
        dense_below: query positions below it attend densely.

    Returns:
        Pages read over pages of dense attention, in every KV head of masked layers.
    """
    tables = page_tables(_one_head(streaming(model, SINKS, window)), 0, page)
    query_blocks = np.arange(ceil_div(length, tables.query_block))
    stops = np.minimum((query_blocks + 1) * tables.query_block, length)
    causal = ceil_div(stops, page)
    selected = tables.select(query_blocks, dense_below)[0]
    read = (selected & (np.arange(selected.shape[1]) < causal[:, None])).sum(axis=1)
    queries = stops - query_blocks * tables.query_block
    return float((read * queries).sum() / (causal * queries).sum())


def equal_window(model: str, wanted: float, length: int, page: int, dense_below: int) -> int:
    """The shortest window whose density at a length is at least the wanted one.

    Args:
        model: folder or Hub id.
        wanted: density, 0 to 1.
        length: of the prompt in tokens.
        page: tokens a page.
        dense_below: query positions below it attend densely.

    Returns:
        Tokens of the window, 1 to `length`.
    """
    low, high = 1, length
    while low < high:
        middle = (low + high) // 2
        if window_density(model, middle, length, page, dense_below) >= wanted - TOLERANCE:
            high = middle
        else:
            low = middle + 1
    return low


def _one_head(masks: MaskSet) -> MaskSet:
    """The first masked layer's first head alone: all are the same."""
    layer = masks.header.layer_types.index("full")
    return replace(
        masks,
        columns=masks.columns[layer : layer + 1, :1],
        diagonals=masks.diagonals[layer : layer + 1, :1],
        true_bits=masks.true_bits[layer : layer + 1, :1],
        modes=masks.modes[layer : layer + 1, :1],
        header=masks.header.model_copy(update={"layer_types": ["full"]}),
    )
