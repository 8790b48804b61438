"""The fit from end to end: texts, bases, losses, anchors, predictions, proof, frontier, check."""

from dataclasses import replace
from typing import Any

import numpy as np

from dam_vllm.calibration.fit import predict
from dam_vllm.calibration.fit.anchors import Assignment, proposals, shares, slots
from dam_vllm.calibration.fit.assemble import Assembler
from dam_vllm.calibration.fit.candidates import (
    DENSE,
    REUSE,
    Candidate,
    candidates,
    default_channels,
    layer_patterns,
)
from dam_vllm.calibration.fit.costs import choosing_costs, tail_costs
from dam_vllm.calibration.fit.curve import Memory, Options, Point, curve
from dam_vllm.calibration.fit.followers import worth_trying
from dam_vllm.calibration.fit.inputs import FitInputs, Prompt, proof_rows
from dam_vllm.calibration.fit.losses import Sums
from dam_vllm.calibration.fit.passes import Passes
from dam_vllm.calibration.fit.probes import (
    BARE,
    kinds_of,
    probe,
    probes,
    relative_errors,
    sensitivities,
    worst_by_part,
)
from dam_vllm.calibration.fit.proof import Curve, Prover, frontier, search, sweep
from dam_vllm.calibration.fit.samples import PLAIN, FitText, with_reply
from dam_vllm.calibration.fit.states import KeyCovariance, hooked, prepare, run
from dam_vllm.calibration.settings import TRUSTS
from dam_vllm.masks.mask_set import FloatArray, MaskSet

FREE, NO_REUSE = "any proposed anchor", "no reuse"
MOST_TRIED = 24
"""Candidates of an anchor that its readers are measured under at most."""


def fit_modes(inputs: FitInputs, prompts: list[Prompt]) -> MaskSet:
    """Chooses every KV head's mode.

    Args:
        inputs: model, settings and patterns.
        prompts: of `fit_prompts`.

    Returns:
        The masks with modes, patterns, bases, budgets, anchors and the frontier; the header's
        parameters tell under "fit" what was used, the curves, and the check.

    Raises:
        CalibrationError: if the target cannot be reached.
        CalibrationStopped: if the caller stopped it; the store holds what is done.
    """
    return _Fit(inputs, prompts).run()


class _Fit:
    def __init__(self, inputs: FitInputs, prompts: list[Prompt]) -> None:
        self.inputs, self.config, self.prompts = inputs, inputs.config, prompts

    def run(self) -> MaskSet:
        inputs, config = self.inputs, self.config
        prepare(inputs.model)
        texts = self._texts()
        every = config.check
        fitted = [text for row, text in enumerate(texts) if row % every != every - 1]
        rotations = self._rotations(fitted)
        channels = config.channels or default_channels(rotations.shape[-1])
        passes = Passes(
            inputs,
            fitted,
            layer_patterns(inputs.patterns, BARE, inputs.layers, config.page),
            candidates(inputs.patterns, BARE, channels),
            rotations,
        )
        sums = passes.losses()
        assembler = Assembler(
            inputs.patterns[BARE].build(), passes.patterns, passes.candidates, rotations,
            sums.chosen / np.maximum(sums.causal, 1.0)[:, None, None], config.page,
        )  # fmt: skip
        curves = self._curves(passes, assembler, sums)
        proof = [fitted[row] for row in proof_rows([(t.kind, t.prompt) for t in fitted], config)]
        prover = Prover(inputs, proof, "proof")

        def prove(point: Point) -> Point:
            return prover.prove(point, assembler.masks)

        proven = search(curves, config.target_error, config.target_density, prove)
        source = next((each for each in curves if each.source == proven[0].source), curves[0])
        around = sweep(source, proven[0], prove)
        masks = assembler.masks(proven[0])
        report = self._report(texts, passes.candidates, curves, proven)
        report["check"] = Prover(inputs, texts[every - 1 :: every], "check").measure(masks)
        header = masks.header.model_copy(
            update={"parameters": masks.header.parameters | {"fit": report}}
        )
        points = frontier([point for point in [*proven, *around] if point.top1 is not None])
        return assembler.with_frontier(replace(masks, header=header), points)

    def _curves(self, passes: Passes, assembler: Assembler, sums: Sums) -> list[Curve]:
        """The curves of all assignments and trusts, the free assignment's first."""
        options, assignments = self._options(passes, assembler, sums)
        named = {FREE: options, NO_REUSE: [each.allowing(None) for each in options]}
        shape = assembler.rotations.shape[:2]
        for each in assignments:
            anchors = each.anchors.reshape(shape)
            named[each.name] = [every.allowing(anchors) for every in options]
        memory = self._memory(passes.candidates)
        return [
            Curve(name, trust, curve(every, memory))
            for name, by_trust in named.items()
            for trust, every in zip(TRUSTS, by_trust, strict=True)
        ]

    def _options(
        self, passes: Passes, assembler: Assembler, sums: Sums
    ) -> tuple[list[Options], list[Assignment]]:
        """What heads may become, by each trust, and the proposed assignments."""
        length, page = max(self.config.lengths), self.config.page
        shape = assembler.rotations.shape
        every = (passes.candidates, passes.patterns, assembler.shares)
        densities = predict.densities(*every, length, page)
        choosing = self._choosing(passes.candidates, shape[-1])
        own = densities + choosing * self.config.choosing_cost
        kept = shares(sums, self.config.ranks)
        assignments = proposals(kept, shape[1])
        flat = slots(assignments, kept)
        tried = worth_trying(sums, densities + choosing, passes.candidates, MOST_TRIED)
        error = passes.readers(flat, tried)
        anchors = flat.reshape(*shape[:2], -1)
        read_densities = predict.read_densities(*every, anchors, tried, length, page)
        options = [
            Options(
                predict.risks(sums, weights),
                densities,
                self._with_tails(own, densities, shape[-1]),
                self.inputs.layers,
                anchors,
                predict.read_risks(sums, error, anchors, tried, weights),
                read_densities,
                self._with_tails(read_densities, read_densities, shape[-1]),
            )
            for weights in self._weights(passes, assembler, sums)
        ]
        return options, assignments

    def _weights(self, passes: Passes, assembler: Assembler, sums: Sums) -> list[np.ndarray]:
        """KL per squared error [parts, layers, kinds, kv_heads], by each trust."""
        by_part = worst_by_part(relative_errors(sums)[0], sums.strata)
        kls = probe(self.inputs, assembler, passes.texts, kinds_of(sums.strata))
        errors = np.stack([by_part[..., index] for index in probes(passes.candidates)])
        return [sensitivities(kls, errors, trust) for trust in TRUSTS]

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

    def _memory(self, every: list[Candidate]) -> Memory | None:
        target = self.config.target_kv_memory
        keeps = np.array([candidate.budget is not None for candidate in every])
        return None if target is None else Memory(keeps, target)

    def _choosing(self, every: list[Candidate], head_size: int) -> np.ndarray:
        """What each candidate was measured to pay to choose pages, in units of dense attention."""
        channels = np.array([candidate.channels or 0 for candidate in every])
        assert self.config.platform is not None
        return choosing_costs(self.config.platform, head_size, channels)

    def _with_tails(self, costs: np.ndarray, densities: np.ndarray, head_size: int) -> np.ndarray:
        """Costs without a tail and with one, by densities: [2, ...]."""
        assert self.config.platform is not None
        tails = tail_costs(self.config.platform, head_size, densities)
        return np.stack([costs, costs + tails * self.config.choosing_cost])

    def _report(
        self,
        texts: list[FitText],
        every: list[Candidate],
        curves: list[Curve],
        proven: list[Point],
    ) -> dict[str, Any]:
        """What the mask file tells about the fit, as JSON values."""
        return {
            **self.config.model_dump(mode="json"),
            "texts": [[text.kind, text.prompt, len(text.ids)] for text in texts],
            "chosen": proven[0].report(),
            "proven": [each.report() for each in proven],
            "curves": {
                str(each.trust): [point.report() for point in each.points]
                for each in curves
                if each.name == FREE
            },
            "heads": self._heads(every, proven[0]),
        }

    def _heads(self, every: list[Candidate], point: Point) -> list[list[str]]:
        """Each KV head's mode in words."""
        kv_heads = point.chosen.shape[1]

        def words(index: int, anchor: int, tail: bool) -> str:
            if index == DENSE:
                return "dense"
            told = every[index].describe(self.inputs.patterns) if index != REUSE else ""
            if index == REUSE:
                told = f"reuse layer {anchor // kv_heads} head {anchor % kv_heads}"
            return f"{told}, tail" if tail else told

        arrays = (point.chosen.tolist(), point.anchors.tolist(), point.tails.tolist())
        return [
            [words(*head) for head in zip(*row, strict=True)] for row in zip(*arrays, strict=True)
        ]
