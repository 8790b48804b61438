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
        chosen: int [layers, kv_heads], candidate, or DENSE.
    """

    loss: float
    density: float
    chosen: np.ndarray

    def report(self) -> dict[str, float]:
        """The point without its choice, for the mask file."""
        dense = int((self.chosen == DENSE).sum())
        return {"density": self.density, "loss": self.loss, "dense_heads": dense}


def curve(risks: np.ndarray, densities: np.ndarray, layers: list[int]) -> list[Point]:
    """Sweeps the price of risk; every head takes what costs least at that price.

    Args:
        risks: KL that each candidate is predicted to cause [layers, kinds, kv_heads, candidates].
        densities: [layers, kv_heads, candidates].
        layers: full-attention layers.

    Returns:
        Points whose density falls and whose loss rises, the dense choice first; others are left
        out.
    """
    shape = densities.shape[:2]
    points = [Point(0.0, 1.0, np.full(shape, DENSE))]
    worst = risks.max(axis=1)
    for price in PRICES:
        cost = densities + price * worst
        chosen = np.where(cost.min(axis=2) < 1.0, cost.argmin(axis=2), DENSE)
        points.append(_point(chosen, risks, densities, layers))
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.loss, each.density)):
        if not front or point.density < front[-1].density:
            front.append(point)
    return front


def _point(
    chosen: np.ndarray, risks: np.ndarray, densities: np.ndarray, layers: list[int]
) -> Point:
    taken = np.maximum(chosen, 0)
    risk = np.take_along_axis(risks, taken[:, None, :, None], axis=3)[..., 0]
    risk = np.where(chosen[:, None] == DENSE, 0.0, risk)
    density = np.take_along_axis(densities, taken[..., None], axis=2)[..., 0]
    density = np.where(chosen == DENSE, 1.0, density)
    loss = risk[layers].sum(axis=(0, 2)).max()
    return Point(float(loss), float(density[layers].mean()), chosen)


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
        raise CalibrationError(
            f"target_density is {target_density}, must be at least {points[-1].density:.4f}, "
            f"which the sparsest choice of these heads reaches"
        )
    return reached[0]
