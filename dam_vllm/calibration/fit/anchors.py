"""Which heads could read each other's pages: proposals of anchors, from what their pages keep.

Similar attention is a guide to what is worth measuring, no more: what a head loses by reading
another's pages is measured for the few pairs proposed here, and whole choices are proven.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dam_vllm.calibration.fit.losses import Sums

REFERENCE_PAGES = 8
"""Pages that each head chooses where heads are compared."""
PARTS = (8, 4)
"""Proposals have as many anchors as there are heads, over these."""
SLOTS = 3
"""Anchors of a head that are measured at most."""
NONE = -1


@dataclass(frozen=True)
class Assignment:
    """One proposal.

    Attributes:
        name: for reports.
        anchors: int [heads], the head whose pages each head may read, or NONE; heads of all
            layers are counted through, and so everywhere in this file.
    """

    name: str
    anchors: np.ndarray


def shares(sums: Sums, ranks: int = 1) -> np.ndarray:
    """What another head's pages keep of a head's attention mass, over what its own choice keeps.

    Args:
        sums: of all texts.
        ranks: tensor-parallel ranks, which hold their KV heads side by side.

    Returns:
        float64 [heads, heads + 1], reader and anchor, of the stratum that loses most; the last
        column is what pages that are read anyway keep. 0 for anchors of later layers and of other
        ranks.
    """
    layers, strata, kv_heads = sums.alone.shape
    heads = layers * kv_heads
    kept = sums.kept.transpose(1, 0, 2, 3, 4).reshape(strata, heads, heads)
    alone = sums.alone.transpose(1, 0, 2).reshape(strata, heads, 1)
    own = np.diagonal(kept, axis1=1, axis2=2)[..., None]
    # Where there are more ranks than heads, each holds one.
    rank = np.arange(heads) % kv_heads * min(ranks, kv_heads) // kv_heads
    kept = np.where(rank[:, None] == rank, kept, 0.0)
    both = np.concatenate([kept, alone], axis=2)
    return np.where(own > 0, both / np.maximum(own, 1e-30), 0.0).min(axis=0)


def proposals(found: np.ndarray, kv_heads: int) -> list[Assignment]:
    """Proposes assignments: one anchor a layer or fewer, and some numbers of anchors in all.

    Args:
        found: of `shares`.
        kv_heads: KV heads a layer.

    Returns:
        The assignments.
    """
    heads = len(found)
    layer = np.arange(heads) // kv_heads
    pooled = _cover(found, heads, layer)
    counts = sorted({max(1, heads // part) for part in PARTS})
    covers = [(f"{count} anchors", _cover(found, count, None)) for count in counts]
    named = [("one a layer", pooled), *covers]
    return [Assignment(name, _nearest(found, anchors)) for name, anchors in named]


def _cover(found: np.ndarray, count: int, groups: np.ndarray | None) -> list[int]:
    """Greedily takes the anchors that keep most over all heads, at most one a group."""
    heads = len(found)
    best, taken = found[:, -1].copy(), list[int]()
    free = np.ones(heads, dtype=bool)
    while len(taken) < count and free.any():
        gains = np.maximum(found[:, :-1], best[:, None]).sum(axis=0) - best.sum()
        anchor = int(np.where(free, gains, -1.0).argmax())
        if gains[anchor] <= 0:
            break
        taken.append(anchor)
        best = np.maximum(best, found[:, anchor])
        free[anchor] = False
        if groups is not None:
            free &= groups != groups[anchor]
    return taken


def _nearest(found: np.ndarray, anchors: Sequence[int]) -> np.ndarray:
    """Each head's best anchor of some; anchors have none, nor heads that are before all."""
    result = np.full(len(found), NONE)
    if anchors:
        kept = found[:, list(anchors)]
        result = np.where(kept.max(axis=1) > 0, np.array(anchors)[kept.argmax(axis=1)], NONE)
        result[list(anchors)] = NONE
    return result


def slots(assignments: Sequence[Assignment], found: np.ndarray) -> np.ndarray:
    """The anchors that are measured for each head: those proposed, then the best of all anchors.

    Args:
        assignments: the proposals.
        found: of `shares`.

    Returns:
        int [heads, SLOTS], NONE where there are fewer.
    """
    heads = len(found)
    result = np.full((heads, SLOTS), NONE)
    used = sorted({int(each) for one in assignments for each in one.anchors if each != NONE})
    for head in range(heads):
        wanted = [int(one.anchors[head]) for one in assignments]
        best = sorted(used, key=lambda anchor: -found[head, anchor])
        best = [anchor for anchor in best if found[head, anchor] > 0]
        both = [each for each in dict.fromkeys(wanted + best) if each not in (NONE, head)]
        result[head, : len(both)] = both[:SLOTS]
    return result
