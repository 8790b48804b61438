"""The fit from end to end: texts, bases, losses, choice, check."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dam_vllm.calibration.errors import CalibrationStopped
from dam_vllm.calibration.fitting.assemble import assemble
from dam_vllm.calibration.fitting.bases import KeyCovariance
from dam_vllm.calibration.fitting.candidates import (
    Candidate,
    LayerPatterns,
    Pattern,
    candidates,
    default_ranks,
    dynamic_density,
    layer_patterns,
)
from dam_vllm.calibration.fitting.choice import DENSE, Point, curve, pick
from dam_vllm.calibration.fitting.config import FitConfig
from dam_vllm.calibration.fitting.losses import Sums, TextLosses, group_names, text_blocks
from dam_vllm.calibration.fitting.sensitivity import (
    alone,
    kinds_of,
    mean_kl,
    relative_errors,
    sensitivities,
    worst_by_kind,
)
from dam_vllm.calibration.fitting.simulate import Simulation
from dam_vllm.calibration.fitting.states import hooked, prepare, run
from dam_vllm.calibration.fitting.store import FitStore
from dam_vllm.calibration.fitting.texts import PLAIN, FitText, question_prompts, with_reply
from dam_vllm.calibration.progress import Work
from dam_vllm.masks.dynamic import BudgetKind
from dam_vllm.masks.mask_set import FloatArray, MaskSet
from dam_vllm.masks.shape import ModelShape

# A pass that measures costs as much as some plain ones; for the progress bar only.
WEIGHTS = {"reply": 2, "basis": 1, "loss": 6, "check": 6, "probe": 1}
PROBE_ROWS, CHECK_ROWS = 256, 64
PROBE_PAGES = 4
BARE = 0


Prompt = tuple[str, list[int]]
"""Kind of a text and its tokens, without a reply."""


@dataclass(frozen=True)
class FitInputs:
    """What the fit works on.

    Attributes:
        model: the decoder, loaded.
        shape: its shape.
        config: the settings.
        patterns: static patterns; the first keeps nothing.
        store: holds what an earlier run did.
        work: counts the passes.
    """

    model: Any
    shape: ModelShape
    config: FitConfig
    patterns: list[Pattern]
    store: FitStore
    work: Work


def fit_prompts(tokenizer: Any, config: FitConfig, plain: list[list[int]]) -> list[Prompt]:
    """Kind and tokens of all texts, plain ones first, replies not yet known."""
    questions = question_prompts(tokenizer, config.lengths, config.questions, config.seed)
    return [*((PLAIN, window) for window in plain), *questions]


def fit_cost(prompts: list[Prompt], shape: ModelShape, config: FitConfig) -> int:
    """Tokens times layers of all passes, as `Work` counts them."""
    layers = len(shape.layer_types)
    passes = sum(len(ids) for _, ids in prompts) * (sum(WEIGHTS.values()) - WEIGHTS["probe"])
    probed = shape.layer_types.count("full") * (shape.kv_heads + 1) * 2
    kinds = dict.fromkeys(kind for kind, _ in prompts)
    return (passes + probed * len(kinds) * _probe_length(config)) * layers


def _probe_length(config: FitConfig) -> int:
    """Length of the texts that heads are probed on: the middle one."""
    return sorted(config.lengths)[(len(config.lengths) - 1) // 2]


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
        self.layers = [i for i, kind in enumerate(inputs.shape.layer_types) if kind == "full"]
        self.candidates: list[Candidate] = []

    def run(self) -> MaskSet:
        prepare(self.inputs.model)
        texts = self._texts()
        every = self.config.check
        fitted = [text for row, text in enumerate(texts) if row % every != every - 1]
        held_out = texts[every - 1 :: every]
        rotations = self._rotations(fitted)
        ranks = self.config.ranks or default_ranks(rotations.shape[-1])
        self.candidates = candidates(self.inputs.patterns, BARE, ranks)
        patterns = layer_patterns(self.inputs.patterns, BARE, self.layers, self.config.page)
        sums = self._sums(fitted, patterns, rotations)
        shares = sums.chosen / np.maximum(sums.causal, 1.0)[:, None, None]
        densities = self._densities(patterns, shares)
        errors = relative_errors(sums)
        by_kind = worst_by_kind(errors, sums.groups)
        risks = by_kind * self._sensitivities(fitted, by_kind, sums.groups, rotations)[..., None]
        points = curve(
            risks, densities, densities + self._scoring(rotations.shape[-1]), self.layers
        )
        point = pick(points, self.config.target_error, self.config.target_density)
        masks = assemble(
            self.inputs.patterns,
            self.candidates,
            point.chosen,
            rotations,
            shares,
            self.config.page,
        )
        report = self._report(texts, points, point, risks)
        report["check"] = self._check(masks, held_out)
        header = masks.header.model_copy(
            update={"parameters": masks.header.parameters | {"fit": report}}
        )
        return replace(masks, header=header)

    def _advance(self, kind: str, ids: list[int]) -> None:
        if self.inputs.work.advance(
            [ids] * WEIGHTS[kind], [len(self.inputs.shape.layer_types) - 1]
        ):
            raise CalibrationStopped

    def _texts(self) -> list[FitText]:
        """All texts with the model's replies."""
        texts = self.inputs.store.texts()
        for row, (kind, ids) in enumerate(self.prompts):
            if row >= len(texts):
                plain = kind == PLAIN
                text = FitText(kind, ids, len(ids)) if plain else self._reply(kind, ids)
                texts.append(text)
                self.inputs.store.save_texts(texts)
            self._advance("reply", ids)
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
            self._advance("basis", text.ids)
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
        groups = group_names(list(dict.fromkeys(text.kind for text in texts)))
        size = (len(shape.layer_types), shape.kv_heads, len(self.candidates))
        total = Sums.empty(groups, *size)
        tile = next(iter(patterns.values())).tile
        for row, text in enumerate(texts):
            sums = self.inputs.store.sums(row, groups)
            if sums is None:
                sums = Sums.empty(groups, *size)
                rng = np.random.default_rng([self.config.seed, row])
                blocks = text_blocks(text, groups, self.config.tiles, page, tile, rng)
                hook = TextLosses(text, sums, blocks, patterns, self.candidates, rotations, page)
                with hooked(hook):
                    run(self.inputs.model, text.ids)
                self.inputs.store.save_sums(row, sums)
            total.add(sums)
            self._advance("loss", text.ids)
        return total

    def _sensitivities(
        self,
        texts: list[FitText],
        by_kind: np.ndarray,
        groups: list[str],
        rotations: FloatArray,
    ) -> np.ndarray:
        """KL per squared error [layers, kinds, kv_heads]; heads are probed alone and by layer."""
        shape, kinds = self.inputs.shape, kinds_of(groups)
        probes = [BARE, self._probe()]
        no_shares = np.zeros((*by_kind.shape[::2], len(self.candidates)))
        masks = [
            assemble(
                self.inputs.patterns, self.candidates,
                np.full((len(shape.layer_types), shape.kv_heads), probe), rotations, no_shares,
                self.config.page,
            )
            for probe in probes
        ]  # fmt: skip
        probed = [self._probe_text(texts, kind) for kind in kinds]
        rows = [_compared(text, PROBE_ROWS) for text in probed]
        full = [
            run(self.inputs.model, text.ids, each) for text, each in zip(probed, rows, strict=True)
        ]
        kls = np.zeros((len(probes), len(shape.layer_types), len(kinds), shape.kv_heads + 1))
        for layer in self.layers:
            stored = self.inputs.store.probes(layer)
            if stored is not None:
                kls[:, layer] = stored
            for probe, head in np.ndindex(len(probes), shape.kv_heads + 1):
                single = alone(masks[probe], layer, head)
                for kind, text in enumerate(probed):
                    if stored is None:
                        with hooked(Simulation(single, self.config.page, text.prompt)):
                            found = run(self.inputs.model, text.ids, rows[kind])
                        kls[probe, layer, kind, head] = mean_kl(full[kind], found)
                    self._advance("probe", text.ids)
            self.inputs.store.save_probes(layer, kls[:, layer])
        return sensitivities(kls, np.stack([by_kind[..., probe] for probe in probes]))

    def _probe(self) -> int:
        """The second probe: a head that chooses few pages by its middle rank."""
        ranks = sorted({each.rank for each in self.candidates if each.rank is not None})
        wanted = (ranks[len(ranks) // 2], BudgetKind.COUNT, PROBE_PAGES)
        return next(
            index
            for index, each in enumerate(self.candidates)
            if each.budget and (each.rank, each.budget.kind, each.budget.value) == wanted
        )

    def _probe_text(self, texts: list[FitText], kind: str) -> FitText:
        """A kind's text whose length is nearest to the one for probes."""
        length = _probe_length(self.config)
        mine = [text for text in texts if text.kind == kind]
        return min(mine, key=lambda text: abs(text.prompt - length))

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

    def _scoring(self, head_size: int) -> np.ndarray:
        """Cost of scoring, in units of dense attention: [candidates]."""
        ranks = np.array([candidate.rank or 0 for candidate in self.candidates])
        return ranks / (2 * head_size) * self.config.scoring_cost

    def _report(
        self, texts: list[FitText], points: list[Point], point: Point, risks: np.ndarray
    ) -> dict[str, Any]:
        """What the mask file tells about the fit, as JSON values."""
        worst = risks.max(axis=1)
        heads = [
            [
                {"mode": "dense", "loss": 0.0}
                if index == DENSE
                else {
                    "mode": self.candidates[index].describe(self.inputs.patterns),
                    "loss": round(float(worst[layer, head, index]), 7),
                }
                for head, index in enumerate(row)
            ]
            for layer, row in enumerate(point.chosen)
        ]
        return {
            **self.config.model_dump(mode="json"),
            "texts": [[text.kind, text.prompt, len(text.ids)] for text in texts],
            "chosen": point.report(),
            "curve": [each.report() for each in points],
            "heads": heads,
        }

    def _check(self, masks: MaskSet, texts: list[FitText]) -> dict[str, Any]:
        """KL and top-1 agreement with full attention, on texts that chose nothing."""
        found: dict[str, list[tuple[float, float]]] = {}
        for text in texts:
            rows = _compared(text, CHECK_ROWS)
            full = run(self.inputs.model, text.ids, rows)
            with hooked(Simulation(masks, self.config.page, text.prompt)):
                other = run(self.inputs.model, text.ids, rows)
            same = float((full.argmax(-1) == other.argmax(-1)).float().mean())
            found.setdefault(text.kind, []).append((mean_kl(full, other), same))
            self._advance("check", text.ids)
        return {
            kind: dict(zip(("kl", "top1"), np.mean(values, axis=0).tolist(), strict=True))
            for kind, values in found.items()
        }


def _compared(text: FitText, most: int) -> list[int]:
    """Rows whose next token is compared: all that reply, or some of a plain text."""
    if text.kind != PLAIN:
        return list(range(text.prompt - 1, len(text.ids) - 1))
    return np.linspace(1, text.prompt - 2, min(most, text.prompt - 2)).astype(int).tolist()
