"""Which candidate each KV head takes: density against predicted KL, swept to a curve."""

from dataclasses import dataclass

import numpy as np

from dam_vllm.calibration.errors import CalibrationError

DENSE = -1
PRICES = np.geomspace(1e-3, 1e6, 181)


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


def curve(
    risks: np.ndarray, densities: np.ndarray, costs: np.ndarray, layers: list[int]
) -> list[Point]:
    """Sweeps the price of risk; every head takes what costs least at that price.

    Args:
        risks: KL that each candidate is predicted to cause [layers, kinds, kv_heads, candidates].
        densities: [layers, kv_heads, candidates].
        costs: densities with what scoring costs.
        layers: full-attention layers.

    Returns:
        Points whose cost falls and whose loss rises, the dense choice first; others are left out.
    """
    points = [Point(0.0, 1.0, 1.0, np.full(densities.shape[:2], DENSE))]
    worst = risks.max(axis=1)
    for price in PRICES:
        priced = costs + price * worst
        chosen = np.where(priced.min(axis=2) < 1.0, priced.argmin(axis=2), DENSE)
        loss = _taken(risks, chosen[:, None], 0.0)[layers].sum(axis=(0, 2)).max()
        density = _taken(densities, chosen, 1.0)[layers].mean()
        cost = _taken(costs, chosen, 1.0)[layers].mean()
        points.append(Point(float(loss), float(density), float(cost), chosen))
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.loss, each.cost)):
        if not front or point.cost < front[-1].cost:
            front.append(point)
    return front


def _taken(values: np.ndarray, chosen: np.ndarray, dense: float) -> np.ndarray:
    """Values [..., kv_heads, candidates] of the chosen candidates, or of dense heads."""
    index = np.broadcast_to(chosen, values.shape[:-1])
    found = np.take_along_axis(values, np.maximum(index, 0)[..., None], axis=-1)[..., 0]
    return np.where(index == DENSE, dense, found)


def pick(points: list[Point], target_error: float | None, target_density: float | None) -> Point:
    """The cheapest point within an error, or the best one within a density.

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
        return [point for point in points if point.loss <= target_error][-1]
    assert target_density is not None
    reached = [point for point in points if point.density <= target_density]
    if not reached:
        least = min(point.density for point in points)
        raise CalibrationError(
            f"target_density is {target_density}, must be at least {least:.4f}, which the "
            f"sparsest choice of these heads reaches"
        )
    return reached[0]
