"""The masks of fitted choices: each KV head's mode, pattern, basis, budget and anchor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dam_vllm.calibration.fit.candidates import DENSE, REUSE, Candidate, LayerPatterns
from dam_vllm.calibration.fit.curve import Point
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.frontier_arrays import DYNAMIC_FIELDS, Frontier, PatternPool, pack_pattern
from dam_vllm.masks.mask_set import FloatArray, HeadMode, MaskSet
from dam_vllm.masks.targets import at_point


@dataclass(frozen=True)
class Assembler:
    """Makes masks of points.

    Attributes:
        bare: masks that keep nothing, with the header.
        patterns: of each full-attention layer.
        candidates: what choices count.
        rotations: float32 [layers, kv_heads, head_size, head_size].
        shares: float [layers, kv_heads, candidates], measured share of the context that is chosen.
        page: tokens a page that budgets were fitted for.
    """

    bare: MaskSet
    patterns: dict[int, LayerPatterns]
    candidates: list[Candidate]
    rotations: FloatArray
    shares: np.ndarray
    page: int

    def masks(self, point: Point) -> MaskSet:
        """The masks of one point; coverage and density are not measured yet."""
        found = at_point(self.with_frontier(self.bare, [point]), 0)
        dynamic = found.dynamic if (found.modes == HeadMode.DYNAMIC).any() else None
        return replace(found, frontier=None, dynamic=dynamic)

    def with_frontier(self, masks: MaskSet, points: Sequence[Point]) -> MaskSet:
        """Adds a frontier, and the bases that its points need."""
        dynamic = masks.dynamic or self._none_chosen()
        return replace(masks, dynamic=dynamic, frontier=self._frontier(points))

    def _frontier(self, points: Sequence[Point]) -> Frontier:
        pool = PatternPool()
        rows = [self._row(point, pool) for point in points]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return Frontier(**arrays, **pool.arrays())

    def _row(self, point: Point, pool: PatternPool) -> dict[str, np.ndarray]:
        """A frontier's arrays for one point."""
        modes = np.full(point.chosen.shape, HeadMode.STATIC, dtype=np.uint8)
        modes[point.chosen == DENSE] = HeadMode.DENSE
        modes[point.chosen == REUSE] = HeadMode.REUSE
        anchors = np.full((*point.chosen.shape, 2), -1, dtype=np.int32)
        reuses = modes == HeadMode.REUSE
        anchors[reuses] = np.stack(np.divmod(point.anchors[reuses], point.chosen.shape[1]), axis=-1)
        patterns, dynamic = np.zeros(modes.shape, dtype=np.int32), self._none_chosen()
        for (layer, head), index in np.ndenumerate(point.chosen):
            candidate = self.candidates[max(index, 0)]
            patterns[layer, head] = pool.add(self._packed(layer, head, candidate.pattern))
            if index >= 0 and candidate.budget is not None:
                modes[layer, head] = HeadMode.DYNAMIC
                assert candidate.channels is not None
                share = float(self.shares[layer, head, index])
                dynamic.put(layer, head, candidate.channels, candidate.budget, share, self.page)
        measured = {"density": point.density, "cost": point.cost, "kl": point.loss}
        measured["top1"] = 1.0 if point.top1 is None else point.top1
        return {
            **{name: np.float32(value) for name, value in measured.items()},
            **{name: getattr(dynamic, name) for name in DYNAMIC_FIELDS},
            "modes": modes,
            "patterns": patterns,
            "anchors": anchors,
            "tails": point.tails.astype(np.uint8),
        }

    def _packed(self, layer: int, head: int, pattern: int) -> bytes:
        if layer in self.patterns:
            return self.patterns[layer].packed[pattern][head]
        bare, each = self.bare, self.bare.heads // self.bare.kv_heads
        return pack_pattern(
            np.zeros_like(bare.columns[0, :each]),
            np.zeros_like(bare.diagonals[0, :each]),
            np.zeros_like(bare.true_bits[0, :each]),
        )

    def _none_chosen(self) -> Dynamic:
        shape = self.rotations.shape[:2]
        return Dynamic(
            rotations=self.rotations.astype(np.float32),
            channels=np.ones(shape, dtype=np.int32),
            kinds=np.zeros(shape, dtype=np.uint8),
            budgets=np.zeros(shape, dtype=np.float32),
            floors=np.zeros(shape, dtype=np.int32),
            caps=np.zeros(shape, dtype=np.int32),
            expected=np.zeros(shape, dtype=np.float32),
        )
