"""The passes over all texts that measure heads: their own candidates, and readers of others'."""

from dataclasses import dataclass

import numpy as np

from dam_vllm.calibration.fit.anchors import REFERENCE_PAGES
from dam_vllm.calibration.fit.candidates import Candidate, LayerPatterns, top_k
from dam_vllm.calibration.fit.followers import TextFollowers
from dam_vllm.calibration.fit.inputs import FitInputs
from dam_vllm.calibration.fit.losses import (
    Block,
    Sums,
    TextLosses,
    stratum_names,
    text_blocks,
)
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.fit.states import hooked, run
from dam_vllm.masks.mask_set import FloatArray


@dataclass(frozen=True)
class Passes:
    """What heads are measured on; a text measured by an earlier run is not measured again.

    Attributes:
        inputs: of the fit.
        texts: the texts.
        patterns: of each full-attention layer.
        candidates: all of them.
        rotations: float32 [layers, kv_heads, head_size, head_size].
    """

    inputs: FitInputs
    texts: list[FitText]
    patterns: dict[int, LayerPatterns]
    candidates: list[Candidate]
    rotations: FloatArray

    @property
    def strata(self) -> list[str]:
        """Names of all strata of rows."""
        return stratum_names(self.texts, self.inputs.config.lengths)

    def losses(self) -> Sums:
        """Losses of all candidates, and what heads keep of each other's attention.

        Raises:
            CalibrationStopped: if the caller stopped it; the store holds the finished texts.
        """
        layers, kv_heads = self.rotations.shape[:2]
        size, store = (layers, kv_heads, len(self.candidates)), self.inputs.store
        reference = top_k(self.candidates, REFERENCE_PAGES)
        total = Sums.empty(self.strata, *size)
        for row, text in enumerate(self.texts):
            sums = store.sums(row, self.strata)
            if sums is None:
                sums = Sums.empty(self.strata, *size)
                hook = TextLosses(
                    sums, self._blocks(row), self.patterns, self.candidates, reference,
                    self.rotations, self.inputs.config.page,
                )  # fmt: skip
                with hooked(hook):
                    run(self.inputs.model, text.ids)
                store.save_sums(row, sums)
            total.add(sums)
            self.inputs.advance("loss", text.ids)
        return total

    def readers(self, anchors: np.ndarray, tried: np.ndarray) -> np.ndarray:
        """Squared errors of heads that read an anchor's pages.

        Args:
            anchors: int [layers * kv_heads, slots], of `anchors.slots`.
            tried: bool [layers, kv_heads, candidates], what anchors choose by.

        Returns:
            float64 [2, layers, strata, kv_heads, slots, candidates], without a tail and with one.

        Raises:
            CalibrationStopped: if the caller stopped it; the store holds the finished texts.
        """
        layers, kv_heads = self.rotations.shape[:2]
        shape = (2, layers, len(self.strata), kv_heads, anchors.shape[1], len(self.candidates))
        total, store = np.zeros(shape), self.inputs.store
        for row, text in enumerate(self.texts):
            error = store.readers(row)
            if error is None:
                error = np.zeros(shape)
                hook = TextFollowers(
                    error, self._blocks(row), self.patterns, self.candidates, anchors, tried,
                    self.rotations, self.inputs.config.page,
                )  # fmt: skip
                with hooked(hook):
                    run(self.inputs.model, text.ids)
                store.save_readers(row, error)
            total += error
            self.inputs.advance("readers", text.ids)
        return total

    def _blocks(self, row: int) -> list[Block]:
        """Rows of a text that are measured, the same in every pass."""
        config = self.inputs.config
        query_block = next(iter(self.patterns.values())).query_block
        blocks = text_blocks(
            self.texts[row], self.strata, config.lengths, config.query_blocks, config.page,
            query_block, np.random.default_rng([config.seed, row]),
        )  # fmt: skip
        most = self.inputs.query_blocks_at_once(len(self.texts[row].ids), self.rotations.shape[-1])
        return [part for block in blocks for part in block.split(most)]
