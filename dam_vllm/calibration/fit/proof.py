"""Choices are proven: the whole model runs under a proposed choice, and the KL that it has counts.

What is predicted adds up errors of single heads. Heads that stand in for each other, or that
need each other, make it wrong by far in either direction; several predictions, which trust the
probes of whole layers more or less, therefore propose, and the measured loss decides.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.curve import Point, pick
from dam_vllm.calibration.fit.inputs import FitInputs, compared_rows
from dam_vllm.calibration.fit.probes import mean_kl
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.fit.simulate import Simulation
from dam_vllm.calibration.fit.states import hooked, run
from dam_vllm.calibration.settings import PROOFS_A_CURVE
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
            with hooked(Simulation(masks, self._inputs.config.page, text.prompt)):
                other = run(self._inputs.model, text.ids, rows)
            same = float((full.argmax(-1) == other.argmax(-1)).float().mean())
            found.setdefault(text.kind, []).append((mean_kl(full, other), same))
            self._inputs.advance(self._kind, text.ids)
        return {
            kind: dict(zip(("kl", "top1"), np.mean(values, axis=0).tolist(), strict=True))
            for kind, values in found.items()
        }

    def loss(self, chosen: np.ndarray, masks: Callable[[], MaskSet]) -> float:
        """The largest KL over kinds of text; measured once a choice, also over several runs."""
        key = hashlib.sha256(np.ascontiguousarray(chosen).tobytes()).hexdigest()[:16]
        found = self._inputs.store.proof(key)
        if found is None:
            found = max(each["kl"] for each in self.measure(masks()).values())
            self._inputs.store.save_proof(key, found)
        else:
            for text in self._texts:
                self._inputs.advance(self._kind, text.ids)
        return found


def prove(
    curves: list[list[Point]],
    target_error: float | None,
    target_density: float | None,
    loss: Callable[[Point], float],
) -> list[Point]:
    """Measures the curves' proposals for a target.

    For a density these are the best points within it. For an error each curve's cheapest point
    within it; where more is measured than predicted, the curve is asked for as much less.

    Args:
        curves: of `choice.curve`.
        target_error: largest measured loss, or None.
        target_density: largest density, or None; one of the two is given.
        loss: measures a point.

    Returns:
        All points measured, with their measured loss; the one to take is first.

    Raises:
        CalibrationError: if no point reaches the density, or the error in the memory.
    """
    measured = []
    for points in curves:
        wanted = target_error
        for _ in range(PROOFS_A_CURVE):
            proposed = pick(points, wanted, target_density)
            found = replace(proposed, loss=loss(proposed))
            measured.append(found)
            if target_error is None or wanted is None or found.loss <= target_error:
                break
            wanted = min(proposed.loss, wanted) * min(0.5, target_error / found.loss)
    if target_error is None:
        return sorted(measured, key=lambda point: point.loss)
    within = [point for point in measured if point.loss <= target_error]
    if not within:
        dense = curves[0][0]
        if dense.density < 1.0:
            least = min(point.loss for point in measured)
            raise CalibrationError(
                f"target_error is {target_error}, must be at least {least:.4f}, which was measured "
                f"within target_kv_memory"
            )
        within = [dense]
    best = min(within, key=lambda point: point.cost)
    return [best, *(point for point in measured if point is not best)]
