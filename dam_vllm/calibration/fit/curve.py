"""Which mode each KV head takes: density against predicted KL, swept to a curve."""

from dataclasses import dataclass, replace

import numpy as np

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.anchors import NONE
from dam_vllm.calibration.fit.candidates import DENSE, REUSE
from dam_vllm.calibration.fit.clusters import Pairs, settle

PRICES = np.geomspace(1e-3, 1e6, 181)
# What it is worth that a head's pages can be freed, as KL of the next token in nats.
RENTS = np.geomspace(1e-8, 1.0, 25)


@dataclass(frozen=True)
class Point:
    """One point of the curve density against loss.

    Attributes:
        loss: KL of the next token in nats, the largest over kinds of text: predicted, or
            measured once the point is proven.
        density: mean over KV heads of full-attention layers.
        cost: the same with what choosing costs, in units of dense attention.
        chosen: int [layers, kv_heads], candidate, DENSE or REUSE.
        anchors: int [layers, kv_heads], the anchor of heads that reuse pages, heads of all layers
            counted through; else NONE.
        tails: bool [layers, kv_heads], which heads have a tail.
        top1: measured share of equal best tokens, of the kind of text that loses most.
        source: which proposal it comes from.
    """

    loss: float
    density: float
    cost: float
    chosen: np.ndarray
    anchors: np.ndarray
    tails: np.ndarray
    top1: float | None = None
    source: str = ""

    def report(self) -> dict[str, float | str | None]:
        """The point without its choice, for the mask file."""
        dense, reuse = (int((self.chosen == mode).sum()) for mode in (DENSE, REUSE))
        found: dict[str, float | str | None] = {
            "density": self.density, "loss": self.loss, "cost": self.cost,
            "dense_heads": dense, "reuse_heads": reuse, "tails": int(self.tails.sum()),
        }  # fmt: skip
        return found if self.top1 is None else found | {"top1": self.top1, "source": self.source}


@dataclass(frozen=True)
class Memory:
    """How many KV heads may keep all their pages.

    Attributes:
        keeps: bool [candidates], those that can read any page; dense and reusing heads, and heads
            with a tail, keep all theirs too.
        target: largest share of the KV heads of full-attention layers.
    """

    keeps: np.ndarray
    target: float


@dataclass(frozen=True)
class Options:
    """What heads may become; where the first dimension is 2, without a tail and with one.

    Attributes:
        risks: KL that each candidate is predicted to cause [2, layers, kinds, kv_heads,
            candidates].
        densities: [layers, kv_heads, candidates].
        costs: densities with what choosing and tails cost [2, layers, kv_heads, candidates].
        layers: full-attention layers.
        anchors: int [layers, kv_heads, slots], whose pages each head could read, or NONE.
        read_risks: KL that reading them causes, by the anchor's candidate [2, layers, kinds,
            kv_heads, slots, candidates]; inf where that was not measured.
        read_densities: [layers, kv_heads, slots, candidates].
        read_costs: the same with what tails cost [2, layers, kv_heads, slots, candidates].
    """

    risks: np.ndarray
    densities: np.ndarray
    costs: np.ndarray
    layers: list[int]
    anchors: np.ndarray
    read_risks: np.ndarray
    read_densities: np.ndarray
    read_costs: np.ndarray

    def allowing(self, anchors: np.ndarray | None) -> "Options":
        """The options under an assignment: int [layers, kv_heads], or None for no reuse."""
        wanted = np.full(self.anchors.shape[:2], NONE) if anchors is None else anchors
        allowed = (self.anchors == wanted[..., None]) & (wanted[..., None] != NONE)
        return replace(self, anchors=np.where(allowed, self.anchors, NONE))


def curve(options: Options, memory: Memory | None = None) -> list[Point]:
    """Sweeps the price of risk; heads and clusters of them take what costs least at that price.

    With a target for memory, heads that keep all their pages pay a rent beside, which is swept
    too.

    Args:
        options: what heads may become.
        memory: how many heads may keep all their pages, or None for all.

    Returns:
        Points within the memory whose cost falls and whose loss rises; others are left out. The
        dense choice is first, unless it takes too much memory.

    Raises:
        CalibrationError: if no choice keeps within the memory.
    """
    shape = options.densities.shape[:2]
    nobody = np.zeros(shape, dtype=bool)
    points = [Point(0.0, 1.0, 1.0, np.full(shape, DENSE), np.full(shape, NONE), nobody)]
    keeps = np.ones((2, options.costs.shape[-1]))
    if memory is not None:
        keeps[0] = memory.keeps
    for rent in (0.0,) if memory is None else RENTS:
        points += [_at_price(options, price, price * rent, keeps) for price in PRICES]
    if memory is not None:
        points = [
            point for point in points if _kept(point, memory, options.layers) <= memory.target
        ]
    if not points:
        raise CalibrationError(
            f"target_kv_memory is {memory and memory.target}: no choice of heads' modes keeps "
            f"within it; give more"
        )
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.loss, each.cost)):
        if not front or point.cost < front[-1].cost:
            front.append(point)
    return front


def _at_price(options: Options, price: float, rent: float, keeps: np.ndarray) -> Point:
    """The choice at a price of risk and a rent for keeping all pages."""
    _, layers, kv_heads, count = options.costs.shape
    own = options.costs + price * options.risks.max(axis=2) + rent * keeps[:, None, None]
    reading = options.read_costs + price * options.read_risks.max(axis=2) + rent
    reader, slot = (options.anchors.reshape(layers * kv_heads, -1) != NONE).nonzero()
    at = (reader // kv_heads, reader % kv_heads, slot)
    pairs = Pairs(reader, options.anchors[at], reading.min(axis=0)[at])
    chosen, anchors = settle(own.min(axis=0).reshape(-1, count), 1.0 + rent, pairs)
    chosen, anchors = chosen.reshape(layers, kv_heads), anchors.reshape(layers, kv_heads)
    return _point(options, chosen, anchors, own.argmin(axis=0), reading.argmin(axis=0))


def _point(
    options: Options,
    chosen: np.ndarray,
    anchors: np.ndarray,
    own_tails: np.ndarray,
    read_tails: np.ndarray,
) -> Point:
    """A choice with its risk, density and cost.

    Args:
        options: what heads may become.
        chosen: int [layers, kv_heads].
        anchors: int [layers, kv_heads].
        own_tails: int [layers, kv_heads, candidates], 1 where a tail is worth its price.
        read_tails: int [layers, kv_heads, slots, candidates], likewise of readers.
    """
    shape, kinds = chosen.shape, options.risks.shape[2]
    risks = np.zeros((shape[0], kinds, shape[1]))
    densities, costs, tails = np.ones(shape), np.ones(shape), np.zeros(shape, dtype=bool)
    for at, index in np.ndenumerate(chosen):
        layer, head = at
        if index == REUSE:
            slot = int((options.anchors[at] == anchors[at]).argmax())
            of_anchor = (head, slot, chosen.flat[anchors[at]])
            tail = read_tails[layer, *of_anchor]
            risks[layer, :, head] = options.read_risks[tail, layer, :, *of_anchor]
            densities[at] = options.read_densities[layer, *of_anchor]
            costs[at] = options.read_costs[tail, layer, *of_anchor]
        elif index != DENSE:
            tail = own_tails[*at, index]
            risks[layer, :, head] = options.risks[tail, layer, :, head, index]
            densities[at] = options.densities[*at, index]
            costs[at] = options.costs[tail, *at, index]
        else:
            continue
        tails[at] = tail
    full = options.layers
    return Point(
        float(risks[full].sum(axis=(0, 2)).max()),
        float(densities[full].mean()),
        float(costs[full].mean()),
        chosen,
        anchors,
        tails,
    )


def _kept(point: Point, memory: Memory, layers: list[int]) -> float:
    """Share of KV heads that keep all their pages."""
    chosen = point.chosen[layers]
    kept = (chosen < 0) | memory.keeps[np.maximum(chosen, 0)] | point.tails[layers]
    return float(np.mean(kept))


def pick(points: list[Point], target_error: float | None, target_density: float | None) -> Point:
    """The cheapest point within an error (else the most careful), or the best within a density.

    Args:
        points: the curve.
        target_error: largest loss, or None.
        target_density: largest density, or None; one of the two is given.

    Returns:
        The point.

    Raises:
        CalibrationError: if no point reaches the density.
    """
    if target_error is not None:
        within = [point for point in points if point.loss <= target_error]
        return within[-1] if within else points[0]
    assert target_density is not None
    reached = [point for point in points if point.density <= target_density]
    if not reached:
        least = min(point.density for point in points)
        raise CalibrationError(
            f"target_density is {target_density}, must be at least {least:.4f}, which the "
            f"sparsest choice of these heads reaches"
        )
    return reached[0]
