"""Mask sets with a frontier, written array by array."""

from dataclasses import replace

import numpy as np

from dam_vllm.masks.frontier_arrays import DYNAMIC_FIELDS, Frontier, PatternPool, pack_pattern

DENSITY = [0.05, 0.1, 0.2, 0.3]
COST = [0.15, 0.12, 0.3, 0.31]
KL = [0.4, 0.1, 0.03, 0.01]
PATTERN = ("columns", "diagonals", "true_bits")


def with_frontier(masks_of_points):
    """The first of four mask sets, with a frontier of all."""
    first, pool = masks_of_points[0], PatternPool()
    each = first.heads // first.kv_heads
    anchors = [
        np.full((*first.modes.shape, 2), -1, dtype=np.int32) if m.anchors is None else m.anchors
        for m in masks_of_points
    ]
    patterns = np.zeros((len(masks_of_points), *first.modes.shape), dtype=np.int32)
    for at in np.ndindex(patterns.shape):
        point, layer, head = at
        heads = slice(head * each, (head + 1) * each)
        arrays = (getattr(masks_of_points[point], name)[layer, heads] for name in PATTERN)
        patterns[at] = pool.add(pack_pattern(*arrays))
    numbers = {"density": DENSITY, "cost": COST, "kl": KL, "top1": [0.9] * 4}
    frontier = Frontier(
        **{name: np.array(value, dtype=np.float32) for name, value in numbers.items()},
        **{
            name: np.stack([getattr(masks.dynamic, name) for masks in masks_of_points])
            for name in DYNAMIC_FIELDS
        },
        modes=np.stack([masks.modes for masks in masks_of_points]),
        patterns=patterns,
        anchors=np.stack(anchors),
        tails=np.stack(
            [np.zeros_like(m.modes) if m.tails is None else m.tails for m in masks_of_points]
        ),
        **pool.arrays(),
    )
    fit = {"page": 16, "check": {}, "heads": [], "chosen": {}}
    header = first.header.model_copy(update={"parameters": {"fit": fit}, "quality": {"worst": 1}})
    return replace(first, frontier=frontier, header=header)
