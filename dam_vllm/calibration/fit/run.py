"""The fit from end to end: texts, bases, losses, predictions, proof, check."""

from dataclasses import replace
from typing import Any

import numpy as np

from dam_vllm.calibration.fit.assemble import assemble
from dam_vllm.calibration.fit.bases import KeyCovariance
from dam_vllm.calibration.fit.candidates import (
    Candidate,
    LayerPatterns,
    candidates,
    default_channels,
    dynamic_density,
    layer_patterns,
)
from dam_vllm.calibration.fit.curve import DENSE, Memory, Point, curve
from dam_vllm.calibration.fit.inputs import FitInputs, Prompt, is_proof
from dam_vllm.calibration.fit.losses import Sums, TextLosses, group_names, text_blocks
from dam_vllm.calibration.fit.probes import (
    BARE,
    kinds_of,
    probe,
    probes,
    relative_errors,
    sensitivities,
    worst_by_part,
)
from dam_vllm.calibration.fit.proof import Prover, prove
from dam_vllm.calibration.fit.samples import PLAIN, FitText, with_reply
from dam_vllm.calibration.fit.states import hooked, prepare, run
from dam_vllm.calibration.settings import TRUSTS
from dam_vllm.masks.mask_set import FloatArray, MaskSet


def fit_modes(inputs: FitInputs, prompts: list[Prompt]) -> MaskSet:
    """Chooses every KV head's mode.

    Args:
        inputs: model, settings and patterns.
        prompts: of `fit_prompts`.

    Returns:
        The masks with modes, patterns, bases and budgets; the header's parameters tell under
        "fit" what was used, the curve, and the check.

    Raises:
        CalibrationError: if the target cannot be reached.
        CalibrationStopped: if the caller stopped it; the store holds what is done.
    """
    return _Fit(inputs, prompts).run()


class _Fit:
    def __init__(self, inputs: FitInputs, prompts: list[Prompt]) -> None:
        self.inputs, self.config, self.prompts = inputs, inputs.config, prompts
        self.candidates: list[Candidate] = []

    def run(self) -> MaskSet:
        inputs, config = self.inputs, self.config
        prepare(inputs.model)
        texts = self._texts()
        every = config.check
        fitted = [text for row, text in enumerate(texts) if row % every != every - 1]
        rotations = self._rotations(fitted)
        self.candidates = candidates(
            inputs.patterns, BARE, config.channels or default_channels(rotations.shape[-1])
        )
        patterns = layer_patterns(inputs.patterns, BARE, inputs.layers, config.page)
        sums = self._sums(fitted, patterns, rotations)
        shares = sums.chosen / np.maximum(sums.causal, 1.0)[:, None, None]
        densities = self._densities(patterns, shares)
        costs = densities + self._scoring(rotations.shape[-1])
        curves = [
            curve(risks, densities, costs, inputs.layers, self._memory())
            for risks in self._risks(sums, fitted, rotations)
        ]

        def masks_of(point: Point) -> MaskSet:
            return assemble(
                inputs.patterns, self.candidates, point.chosen, rotations, shares, config.page
            )

        proof = [text for text in fitted if is_proof(config, text.kind, text.prompt)]
        prover = Prover(inputs, proof, "proof")
        proven = prove(
            curves,
            config.target_error,
            config.target_density,
            lambda point: prover.loss(point.chosen, lambda: masks_of(point)),
        )
        masks = masks_of(proven[0])
        report = self._report(texts, curves, proven)
        report["check"] = Prover(inputs, texts[every - 1 :: every], "check").measure(masks)
        header = masks.header.model_copy(
            update={"parameters": masks.header.parameters | {"fit": report}}
        )
        return replace(masks, header=header)

    def _risks(self, sums: Sums, texts: list[FitText], rotations: FloatArray) -> list[np.ndarray]:
        """Predicted KL of each candidate [layers, kinds, kv_heads, candidates], by each trust."""
        by_part = worst_by_part(relative_errors(sums), sums.groups)
        kinds = kinds_of(sums.groups)
        kls = probe(self.inputs, self.candidates, rotations, texts, kinds)
        errors = np.stack([by_part[..., index] for index in probes(self.candidates)])
        weights = [sensitivities(kls, errors, trust)[..., None] for trust in TRUSTS]
        return [(by_part * weight).sum(axis=0) for weight in weights]

    def _texts(self) -> list[FitText]:
        """All texts with the model's replies."""
        texts = self.inputs.store.texts()
        for row, (kind, ids) in enumerate(self.prompts):
            if row >= len(texts):
                plain = kind == PLAIN
                text = FitText(kind, ids, len(ids)) if plain else self._reply(kind, ids)
                texts.append(text)
                self.inputs.store.save_texts(texts)
            self.inputs.advance("reply", ids)
        return texts

    def _reply(self, kind: str, ids: list[int]) -> FitText:
        return with_reply(self.inputs.model, kind, ids)

    def _rotations(self, texts: list[FitText]) -> FloatArray:
        stored = self.inputs.store.rotations()
        covariance = KeyCovariance()
        for text in texts:
            if stored is None:
                with hooked(covariance):
                    run(self.inputs.model, text.ids)
            self.inputs.advance("basis", text.ids)
        if stored is not None:
            return stored
        shape = self.inputs.shape
        rotations = covariance.rotations(len(shape.layer_types), shape.kv_heads)
        self.inputs.store.save_rotations(rotations)
        return rotations

    def _sums(
        self, texts: list[FitText], patterns: dict[int, LayerPatterns], rotations: FloatArray
    ) -> Sums:
        """Losses of all texts; a text measured by an earlier run is not measured again."""
        shape, page = self.inputs.shape, self.config.page
        lengths = self.config.lengths
        groups = group_names(texts, lengths)
        size = (len(shape.layer_types), shape.kv_heads, len(self.candidates))
        total = Sums.empty(groups, *size)
        query_block = next(iter(patterns.values())).query_block
        for row, text in enumerate(texts):
            sums = self.inputs.store.sums(row, groups)
            if sums is None:
                sums = Sums.empty(groups, *size)
                rng = np.random.default_rng([self.config.seed, row])
                blocks = text_blocks(
                    text, groups, lengths, self.config.query_blocks, page, query_block, rng
                )
                hook = TextLosses(text, sums, blocks, patterns, self.candidates, rotations, page)
                with hooked(hook):
                    run(self.inputs.model, text.ids)
                self.inputs.store.save_sums(row, sums)
            total.add(sums)
            self.inputs.advance("loss", text.ids)
        return total

    def _densities(self, patterns: dict[int, LayerPatterns], shares: np.ndarray) -> np.ndarray:
        """Density of each candidate at the longest length: [layers, kv_heads, candidates]."""
        length, page = max(self.config.lengths), self.config.page
        result = np.ones(shares.shape)
        for layer, each in patterns.items():
            static, anyway = each.densities(length, page), each.bare_pages(length, page)
            for index, candidate in enumerate(self.candidates):
                if candidate.budget is None:
                    result[layer, :, index] = static[candidate.pattern]
                    continue
                for head, pages in enumerate(anyway):
                    share = float(shares[layer, head, index])
                    result[layer, head, index] = dynamic_density(candidate.budget, pages, share)
        return result

    def _memory(self) -> Memory | None:
        target = self.config.target_kv_memory
        keeps = np.array([candidate.budget is not None for candidate in self.candidates])
        return None if target is None else Memory(keeps, target)

    @property
    def _scoring_cost(self) -> float:
        return self.config.scoring_cost_on(self.inputs.model.device.type)

    def _scoring(self, head_size: int) -> np.ndarray:
        """Cost of scoring, in units of dense attention: [candidates]."""
        channels = np.array([candidate.channels or 0 for candidate in self.candidates])
        return channels / (2 * head_size) * self._scoring_cost

    def _report(
        self, texts: list[FitText], curves: list[list[Point]], proven: list[Point]
    ) -> dict[str, Any]:
        """What the mask file tells about the fit, as JSON values."""
        heads = [
            [
                "dense" if index == DENSE else self.candidates[index].describe(self.inputs.patterns)
                for index in row
            ]
            for row in proven[0].chosen
        ]
        return {
            **self.config.model_dump(mode="json"),
            "scoring_cost": self._scoring_cost,
            "texts": [[text.kind, text.prompt, len(text.ids)] for text in texts],
            "chosen": proven[0].report(),
            "proven": [each.report() for each in proven],
            "curves": {
                str(trust): [each.report() for each in points]
                for trust, points in zip(TRUSTS, curves, strict=True)
            },
            "heads": heads,
        }
