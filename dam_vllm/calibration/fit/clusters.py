"""Anchors and their readers at a price: an anchor's budget decides its own lot and theirs.

What heads pay is density and choosing, and the risk times a price. Heads that read no other's
pages take what is cheapest for them alone. Anchors are then opened one by one, each with the
budget that saves most over itself and all heads that would rather read its pages, until none
saves anything; at last every anchor's budget, and whether it stays one, is looked at again.
"""

from dataclasses import dataclass

import numpy as np

from dam_vllm.calibration.fit.anchors import NONE
from dam_vllm.calibration.fit.candidates import DENSE, REUSE

ROUNDS = 2
LEAST = 1e-12


@dataclass(frozen=True)
class Pairs:
    """Readers and their possible anchors; heads of all layers are counted through.

    Attributes:
        head: int [pairs], the reader.
        anchor: int [pairs].
        priced: float [pairs, candidates], what the reader pays by the anchor's candidate; inf
            where that was not measured.
    """

    head: np.ndarray
    anchor: np.ndarray
    priced: np.ndarray


def settle(own: np.ndarray, dense: float, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Chooses every head's lot.

    Args:
        own: float [heads, candidates], what each candidate of a head's own pays.
        dense: what a dense head pays.
        pairs: who could read whose pages.

    Returns:
        int [heads], candidate, DENSE or REUSE, and int [heads], the anchor of readers, else NONE.
    """
    opened = _open(own, dense, pairs)
    for _ in range(ROUNDS):
        for anchor in np.flatnonzero(opened != NONE):
            opened[anchor] = _best(own, dense, pairs, opened, anchor)
    _, anchors = _pays(own, dense, pairs, opened)
    alone = np.where(own.min(axis=1) < dense, own.argmin(axis=1), DENSE)
    chosen = np.where(opened != NONE, opened, np.where(anchors != NONE, REUSE, alone))
    return chosen, anchors


def _open(own: np.ndarray, dense: float, pairs: Pairs) -> np.ndarray:
    """Opens anchors one by one: int [heads], their candidate, or NONE."""
    heads, count = own.shape
    opened = np.full(heads, NONE)
    while True:
        pays, _ = _pays(own, dense, pairs, opened)
        saved = np.maximum(pays[pairs.head, None] - pairs.priced, 0.0)
        saved[opened[pairs.head] != NONE] = 0.0
        gains = np.zeros((heads, count))
        np.add.at(gains, pairs.anchor, saved)
        read = (gains > 0.0).any(axis=1)
        gains += pays[:, None] - own
        gains[(opened != NONE) | ~read] = 0.0
        anchor, candidate = np.unravel_index(gains.argmax(), gains.shape)
        if gains[anchor, candidate] <= LEAST:
            return opened
        opened[anchor] = candidate


def _best(own: np.ndarray, dense: float, pairs: Pairs, opened: np.ndarray, anchor: int) -> int:
    """The best candidate of an anchor with all others as they are, or NONE to close it."""
    without = opened.copy()
    without[anchor] = NONE
    pays, _ = _pays(own, dense, pairs, without)
    readers = (pairs.anchor == anchor) & (without[pairs.head] == NONE)
    saved = np.maximum(pays[pairs.head[readers], None] - pairs.priced[readers], 0.0)
    gains = saved.sum(axis=0)
    gains = np.where(gains > 0.0, gains + pays[anchor] - own[anchor], 0.0)
    return int(gains.argmax()) if gains.max() > LEAST else NONE


def _pays(
    own: np.ndarray, dense: float, pairs: Pairs, opened: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each head pays with some anchors open, and the anchor of those that read one's pages."""
    heads = len(own)
    budget = opened[pairs.anchor]
    usable = (budget != NONE) & (opened[pairs.head] == NONE)
    price = np.where(usable, pairs.priced[np.arange(len(budget)), budget], np.inf)
    pays = np.minimum(own.min(axis=1), dense)
    anchors = np.full(heads, NONE)
    for pair in np.flatnonzero(price < pays[pairs.head]):
        head = pairs.head[pair]
        if price[pair] < pays[head]:
            pays[head], anchors[head] = price[pair], pairs.anchor[pair]
    is_open = opened != NONE
    pays[is_open] = own[is_open, opened[is_open]]
    return pays, anchors
