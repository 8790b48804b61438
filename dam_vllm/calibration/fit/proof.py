"""Choices are proven: the whole model runs under a proposed choice, and the KL that it has counts.

What is predicted adds up errors of single heads. Heads that stand in for each other, or that
need each other, make it wrong by far in either direction; several predictions, which trust the
probes of whole layers more or less, therefore propose, and the measured loss decides.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.curve import Point, pick
from dam_vllm.calibration.fit.inputs import FitInputs, compared_rows
from dam_vllm.calibration.fit.probes import mean_kl
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.fit.simulate import Simulation
from dam_vllm.calibration.fit.states import hooked, run
from dam_vllm.calibration.settings import FRONTIER_STEPS, PROOFS_A_CURVE, TRUSTS_KEPT
from dam_vllm.masks.mask_set import MaskSet

ROWS = 64

Agreement = dict[str, dict[str, float]]
"""For each kind of text, "kl" in nats and "top1", the share of equal best tokens."""


class Prover:
    """Measures masks against full attention on some texts.

    Args:
        inputs: of the fit.
        texts: the texts.
        kind: of the passes, for the progress.
    """

    def __init__(self, inputs: FitInputs, texts: list[FitText], kind: str) -> None:
        self._inputs, self._texts, self._kind = inputs, texts, kind
        self._rows = [compared_rows(text, ROWS) for text in texts]
        self._full = [
            run(inputs.model, text.ids, rows) for text, rows in zip(texts, self._rows, strict=True)
        ]

    def measure(self, masks: MaskSet) -> Agreement:
        """Runs all texts under masks.

        Raises:
            CalibrationStopped: if the caller stopped it.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for text, rows, full in zip(self._texts, self._rows, self._full, strict=True):
            page = self._inputs.config.page
            with hooked(Simulation(masks, page, text.prompt, compared=rows)):
                other = run(self._inputs.model, text.ids, rows)
            same = float((full.argmax(-1) == other.argmax(-1)).float().mean())
            found.setdefault(text.kind, []).append((mean_kl(full, other), same))
            self._inputs.advance(self._kind, text.ids)
        return {
            kind: dict(zip(("kl", "top1"), np.mean(values, axis=0).tolist(), strict=True))
            for kind, values in found.items()
        }

    def prove(self, point: Point, masks: Callable[[Point], MaskSet]) -> Point:
        """The point with its measured loss and share of equal best tokens.

        It is measured once a choice, also over several runs.
        """
        choice = np.stack([point.chosen, point.anchors, point.tails]).astype(np.int64)
        key = hashlib.sha256(choice.tobytes()).hexdigest()[:16]
        found = self._inputs.store.proof(key)
        if found is None:
            measured = self.measure(masks(point)).values()
            found = max(each["kl"] for each in measured), min(each["top1"] for each in measured)
            self._inputs.store.save_proof(key, found)
        else:
            for text in self._texts:
                self._inputs.advance(self._kind, text.ids)
        return replace(point, loss=found[0], top1=found[1])


@dataclass(frozen=True)
class Curve:
    """A curve of `curve.curve`.

    Attributes:
        name: of its assignment of anchors.
        trust: how far its prediction trusts probes of layers.
        points: its points.
    """

    name: str
    trust: float
    points: list[Point]

    @property
    def source(self) -> str:
        """In words, for reports."""
        return f"{self.name}, trust {self.trust:g}"


def propose(
    curve: Curve,
    target_error: float | None,
    target_density: float | None,
    prove: Callable[[Point], Point],
) -> list[Point]:
    """Measures a curve's proposals for a target.

    For a density this is the best point within it. For an error it is the cheapest point within
    it; where more is measured than predicted, the curve is asked for as much less.

    Args:
        curve: the curve.
        target_error: largest measured loss, or None.
        target_density: largest density, or None; one of the two is given.
        prove: measures a point.

    Returns:
        All points measured.

    Raises:
        CalibrationError: if no point reaches the density.
    """
    found, wanted = list[Point](), target_error
    for _ in range(PROOFS_A_CURVE):
        proposed = pick(curve.points, wanted, target_density)
        found.append(replace(prove(proposed), source=curve.source))
        if target_error is None or wanted is None or found[-1].loss <= target_error:
            break
        wanted = min(proposed.loss, wanted) * min(0.5, target_error / found[-1].loss)
    return found


def ranked(measured: Sequence[Point], target_error: float | None, dense: Point) -> list[Point]:
    """Measured points, the one to take first.

    Args:
        measured: within the target for density, if that is the one.
        target_error: largest measured loss, or None for the least.
        dense: the most careful point; taken where no other is within the error.

    Returns:
        The points, best first.

    Raises:
        CalibrationError: if no point is within the error, and memory allows no dense choice.
    """
    if target_error is None:
        return sorted(measured, key=lambda point: point.loss)
    within = sorted(
        (point for point in measured if point.loss <= target_error), key=lambda point: point.cost
    )
    if not within:
        if dense.density < 1.0:
            least = min(point.loss for point in measured)
            raise CalibrationError(
                f"target_error is {target_error}, must be at least {least:.4f}, which was measured "
                f"within target_kv_memory"
            )
        within = [dense]
    return [*within, *(point for point in measured if point.loss > target_error)]


def search(
    curves: Sequence[Curve],
    target_error: float | None,
    target_density: float | None,
    prove: Callable[[Point], Point],
) -> list[Point]:
    """Measures what curves propose: the first assignment's all, of others those that it bears out.

    Args:
        curves: of all assignments and trusts, the first assignment's first.
        target_error: largest measured loss, or None.
        target_density: largest density, or None; one of the two is given.
        prove: measures a point.

    Returns:
        All points measured, the one to take first.

    Raises:
        CalibrationError: if no point reaches the target.
    """
    first = [curve for curve in curves if curve.name == curves[0].name]
    measured = [propose(curve, target_error, target_density, prove) for curve in first]
    order = sorted(range(len(first)), key=lambda row: _merit(measured[row], target_error))
    trusts = [first[row].trust for row in order[:TRUSTS_KEPT]]
    for curve in curves[len(first) :]:
        if curve.trust in trusts:
            measured.append(propose(curve, target_error, target_density, prove))
    return ranked([point for each in measured for point in each], target_error, first[0].points[0])


def _merit(points: list[Point], target_error: float | None) -> tuple[float, float]:
    """What is to be small of a curve's measured points."""
    if target_error is None:
        return min(point.loss for point in points), 0.0
    within = [point.cost for point in points if point.loss <= target_error]
    return min(within, default=np.inf), min(point.loss for point in points)


def sweep(curve: Curve, taken: Point, prove: Callable[[Point], Point]) -> list[Point]:
    """Measures a curve's points around the one taken, cheaper and more careful ones."""
    found = []
    least = min(point.density for point in curve.points)
    for step in FRONTIER_STEPS:
        if least <= taken.density * step < 1.0:
            point = pick(curve.points, None, taken.density * step)
            found.append(replace(prove(point), source=curve.source))
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in loss and in density or cost, the cheapest first."""
    kept = [
        point for point in points
        if not any(
            other.loss <= point.loss and other.density <= point.density and other.cost <= point.cost
            and (other.loss, other.density, other.cost) != (point.loss, point.density, point.cost)
            for other in points
        )
    ]  # fmt: skip
    unique = {(point.loss, point.density, point.cost): point for point in kept}
    return sorted(unique.values(), key=lambda point: point.cost)
