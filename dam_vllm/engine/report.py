"""The table that serving logs at start: which masks, how dense, which layers are not masked."""

import json

import numpy as np
from vllm.distributed import get_tensor_model_parallel_rank

from dam_vllm.engine.serving import Serving, logger
from dam_vllm.masks.density import density
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.tails import span_pages

REASONS = {"sliding": "left to vLLM: sliding window", "other": "left to vLLM: no plain attention"}


def log_masks(serving: Serving, page: int, length: int) -> None:
    """Logs one table, once a process.

    Args:
        serving: what is served.
        page: tokens a page.
        length: the model's length in tokens, at which density is told.
    """
    if get_tensor_model_parallel_rank() == 0:
        logger.info_once("\n".join(describe(serving, page, length)))


def describe(serving: Serving, page: int, length: int) -> list[str]:
    """Lines of the table."""
    masks, options = serving.masks, serving.options
    _, kv_density = density(masks, [length], page, serving.dense_below)
    full = np.array([kind == "full" for kind in masks.header.layer_types])
    lines = [
        f"DAM masks {serving.file}: {masks.header.kind}, PCL {masks.pcl}, page {page}, "
        f"dense below {serving.dense_below}, kernel {options.kernel}; density at {length} "
        f"tokens {kv_density[0][full].mean() if full.any() else 1.0:.3f}",
        "layer  density  KV heads",
    ]
    for layer, kind in enumerate(masks.header.layer_types):
        note = REASONS.get(kind) or _modes(masks.modes[layer])
        lines.append(f"{layer:5d}  {kv_density[0, layer].mean():7.3f}  {note}")
    return lines + _dynamic(masks, page) + _tails(masks, page) + _quality(masks)


def _dynamic(masks: MaskSet, page: int) -> list[str]:
    """What dynamic heads cost in memory, who follows them, whether budgets fit the page size."""
    if masks.dynamic is None:
        return []
    count, reusing = (
        int((masks.modes == mode).sum()) for mode in (HeadMode.DYNAMIC, HeadMode.REUSE)
    )
    size = masks.dynamic.rotations.shape[-1] ** 2 * 4 * count
    lines = [
        f"{count} dynamic KV heads: their keys are stored rotated, {size / 2**20:.2f} MiB of bases "
        "over all ranks, nothing beside the KV cache"
    ]
    if masks.anchors is not None and reusing:
        anchors = np.unique(masks.anchors[masks.modes == HeadMode.REUSE], axis=0)
        lines.append(f"{reusing} KV heads reuse the pages that {len(anchors)} of them choose")
    fitted = masks.header.fitted_page
    if fitted not in (None, page):
        lines.append(
            f"budgets were fitted for pages of {fitted} tokens: with {page}, density and accuracy "
            f"differ from what the file says"
        )
    return lines


def _tails(masks: MaskSet, page: int) -> list[str]:
    """How many heads have tails, and what they keep beside the cache."""
    if masks.tails is None:
        return []
    layers, span = int(masks.tails.any(axis=1).sum()), span_pages(page) * page
    return [
        f"{int(masks.tails.sum())} KV heads have a tail, spans of {span} tokens: beside the cache "
        f"of {layers} layers there is room for a mean key and value a page and head"
    ]


def _quality(masks: MaskSet) -> list[str]:
    """The stored evaluation's worst task, in a line."""
    if masks.header.quality is None:
        return []
    return [f"quality report: {json.dumps(masks.header.quality.get('worst'))} (dam-vllm inspect)"]


def _modes(modes: np.ndarray) -> str:
    counts = [(mode.name.lower(), int((modes == mode).sum())) for mode in HeadMode]
    return ", ".join(f"{count} {name}" for name, count in counts if count)
