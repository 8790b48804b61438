"""Which candidate each KV head takes: density against predicted KL, swept to a curve."""

from dataclasses import dataclass

import numpy as np

from dam_vllm.calibration.errors import CalibrationError

DENSE = -1
PRICES = np.geomspace(1e-3, 1e6, 181)
# What it is worth that a head's pages can be freed, as KL of the next token in nats.
RENTS = np.geomspace(1e-8, 1.0, 25)


@dataclass(frozen=True)
class Point:
    """One point of the curve density against loss.

    Attributes:
        loss: predicted KL of the next token in nats, the largest over kinds of text.
        density: mean over KV heads of full-attention layers.
        cost: the same with what scoring costs, in units of dense attention.
        chosen: int [layers, kv_heads], candidate, or DENSE.
    """

    loss: float
    density: float
    cost: float
    chosen: np.ndarray

    def report(self) -> dict[str, float]:
        """The point without its choice, for the mask file."""
        dense = int((self.chosen == DENSE).sum())
        numbers = {"density": self.density, "loss": self.loss, "cost": self.cost}
        return numbers | {"dense_heads": dense}


@dataclass(frozen=True)
class Memory:
    """How many KV heads may keep all their pages.

    Attributes:
        keeps: bool [candidates], those that can read any page; dense heads can too.
        target: largest share of the KV heads of full-attention layers.
    """

    keeps: np.ndarray
    target: float


def curve(
    risks: np.ndarray,
    densities: np.ndarray,
    costs: np.ndarray,
    layers: list[int],
    memory: Memory | None = None,
) -> list[Point]:
    """Sweeps the price of risk; every head takes what costs least at that price.

    With a target for memory, heads that keep all their pages pay a rent beside, which is swept
    too.

    Args:
        risks: KL that each candidate is predicted to cause [layers, kinds, kv_heads, candidates].
        densities: [layers, kv_heads, candidates].
        costs: densities with what scoring costs.
        layers: full-attention layers.
        memory: how many heads may keep all their pages, or None for all.

    Returns:
        Points within the memory whose cost falls and whose loss rises; others are left out. The
        dense choice is first, unless it takes too much memory.

    Raises:
        CalibrationError: if no choice keeps within the memory.
    """
    points = [Point(0.0, 1.0, 1.0, np.full(densities.shape[:2], DENSE))]
    worst = risks.max(axis=1)
    keeps = np.ones(densities.shape[2]) if memory is None else memory.keeps.astype(float)
    for rent in (0.0,) if memory is None else RENTS:
        for price in PRICES:
            priced = costs + price * (worst + rent * keeps)
            dense = priced.min(axis=2) >= 1.0 + price * rent
            chosen = np.where(dense, DENSE, priced.argmin(axis=2))
            loss = _taken(risks, chosen[:, None], 0.0)[layers].sum(axis=(0, 2)).max()
            density = _taken(densities, chosen, 1.0)[layers].mean()
            cost = _taken(costs, chosen, 1.0)[layers].mean()
            points.append(Point(float(loss), float(density), float(cost), chosen))
    if memory is not None:
        points = [point for point in points if _kept(point, memory, layers) <= memory.target]
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


def _kept(point: Point, memory: Memory, layers: list[int]) -> float:
    """Share of KV heads that keep all their pages."""
    chosen = point.chosen[layers]
    return float(np.mean((chosen == DENSE) | memory.keeps[np.maximum(chosen, 0)]))


def _taken(values: np.ndarray, chosen: np.ndarray, dense: float) -> np.ndarray:
    """Values [..., kv_heads, candidates] of the chosen candidates, or of dense heads."""
    index = np.broadcast_to(chosen, values.shape[:-1])
    found = np.take_along_axis(values, np.maximum(index, 0)[..., None], axis=-1)[..., 0]
    return np.where(index == DENSE, dense, found)


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
