"""How much an error of a head's output matters: the KL that it causes, head by head.

The same relative error is harmless in one head and ruins the next token in another. Each KV head
is therefore probed alone, all others attending to everything: the mean KL of the next-token
distribution over its squared error is its sensitivity. It hardly depends on the size of the
error, so that errors times sensitivities, summed over heads, predict the KL of a whole choice.
Rows of context, of the page that ends a question and of its reply are probed apart: an error in a
reply meets the next token at once, one in the context hardly ever, and of a question's page the
last row alone begins the reply.
Heads may stand in for each other, so that none is missed alone: all heads of a layer are probed
together too. Where all of them fail, that KL is far beyond what some of them failing causes, so
that the truth lies between the two; see `dam_vllm.calibration.fit.proof`.
"""

from dataclasses import replace
from functools import cached_property
from itertools import product

import numpy as np
import torch

from dam_vllm.calibration.fit.anchors import NONE
from dam_vllm.calibration.fit.assemble import Assembler
from dam_vllm.calibration.fit.candidates import Candidate, top_k
from dam_vllm.calibration.fit.curve import Point
from dam_vllm.calibration.fit.inputs import FitInputs, compared_rows
from dam_vllm.calibration.fit.losses import PARTS, Sums
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.fit.simulate import Simulation
from dam_vllm.calibration.fit.states import hooked
from dam_vllm.calibration.fit.suffix import Suffix
from dam_vllm.masks.mask_set import HeadMode, MaskSet

# Errors below tell nothing: the KL that they cause drowns in rounding.
LEAST_ERROR = 1e-5


def kinds_of(strata: list[str]) -> list[str]:
    """Kinds of text, in order."""
    return list(dict.fromkeys(stratum.split("/")[0] for stratum in strata))


def worst_by_part(errors: np.ndarray, strata: list[str]) -> np.ndarray:
    """Largest squared error over lengths, of each part of a text.

    Args:
        errors: squared relative errors [..., layers, strata, kv_heads, candidates].
        strata: names "kind/part/length".

    Returns:
        float64 [parts, ..., layers, kinds, kv_heads, candidates].
    """
    split = [stratum.split("/") for stratum in strata]
    found = []
    for part in PARTS:
        rows = [
            [row for row, (*named, _) in enumerate(split) if named == [kind, part]]
            for kind in kinds_of(strata)
        ]
        found.append([errors[..., some, :, :].max(axis=-3, initial=0.0) for some in rows])
    return np.stack([np.stack(each, axis=-3) for each in found])


def relative_errors(sums: Sums) -> np.ndarray:
    """Squared errors over the layer's squared output, see `Sums.error`."""
    return sums.error / np.maximum(sums.norm, 1e-30)[:, :, None, None]


def alone(masks: MaskSet, layer: int, head: int) -> MaskSet:
    """Masks under which some of a layer's KV heads are as they are, and all others are dense.

    Args:
        masks: the mask set.
        layer: global layer index.
        head: the KV head, or the number of KV heads for all of the layer's.

    Returns:
        The masks.
    """
    modes = np.full_like(masks.modes, HeadMode.DENSE)
    heads = slice(None) if head == masks.kv_heads else head
    modes[layer, heads] = masks.modes[layer, heads]
    return replace(masks, modes=modes)


def sensitivities(kls: np.ndarray, errors: np.ndarray, trust: float) -> np.ndarray:
    """KL per squared error: the probes' largest of a head alone, moved towards its layer's.

    Args:
        kls: [probes, ..., kv_heads + 1], mean KL that each probe causes, the one of all of a
            layer's heads together last; NaN where heads were not probed alone, whose KL per error
            is then their layer's.
        errors: [probes, ..., kv_heads], squared error of each head under the probe.
        trust: how far probes of whole layers count, 0 to 1, on a scale of ratios.

    Returns:
        float64 [..., kv_heads]; where no probe errs enough, the largest of all heads.
    """
    both = np.concatenate([errors, errors.sum(axis=-1, keepdims=True)], axis=-1)
    each = np.where(both > LEAST_ERROR, np.maximum(kls, 0) / np.maximum(both, LEAST_ERROR), -1.0)
    found = each.max(axis=0)
    single = np.where(np.isnan(found[..., :-1]), found[..., -1:], found[..., :-1])
    layer = np.maximum(single, found[..., -1:])
    blended = np.maximum(single, 0) ** (1 - trust) * np.maximum(layer, 0) ** trust
    return np.where(single < 0, max(layer.max(), 0.0), blended)


def mean_kl(full: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(full || other) in nats of logits float32 [rows, vocabulary]."""
    first, second = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


BARE = 0
PAGES = 4
ROWS = 256


def probes(candidates: list[Candidate]) -> list[int]:
    """The candidates that heads are probed with: nothing, and few pages by the middle channels."""
    return [BARE, top_k(candidates, PAGES)]


def probe(
    inputs: FitInputs, assembler: Assembler, texts: list[FitText], kinds: list[str]
) -> np.ndarray:
    """Runs every probe on every head alone and on all of a layer's heads together.

    Parts of a text are probed apart.

    Args:
        inputs: of the fit.
        assembler: makes masks of candidates.
        texts: one of each kind is used.
        kinds: kinds of text.

    Returns:
        Mean KL float64 [probes, parts, layers, kinds, kv_heads + 1]; the whole layer's last.

    Raises:
        CalibrationStopped: if the caller stopped it; the store holds the finished layers.
    """
    shape = inputs.shape
    size = (len(shape.layer_types), shape.kv_heads)
    none = np.full(size, NONE)
    masks = [
        assembler.masks(
            Point(0.0, 1.0, 1.0, np.full(size, index), none, np.zeros(size, dtype=bool))
        )
        for index in probes(assembler.candidates)
    ]
    kls = np.zeros((len(masks), len(PARTS), size[0], len(kinds), shape.kv_heads + 1))
    for row, kind in enumerate(kinds):
        probed = _Probed(inputs, _text(inputs, texts, kind))
        for layer in inputs.layers:
            found = inputs.store.probes(kind, layer)
            if found is None:
                found = probed.layer(layer, masks)
                inputs.store.save_probes(kind, layer, found)
            else:
                probed.count(layer, len(masks))
            kls[:, :, layer, row] = found
    return kls


class _Probed:
    """A text under probes, part by part.

    A probe begins at the layer that is probed, and past the context at the question's last page:
    what is before is full attention's.
    """

    def __init__(self, inputs: FitInputs, text: FitText) -> None:
        self.inputs, self.text = inputs, text
        asking, end = text.asking(inputs.config.page), len(text.ids)
        self.spans = [(0, asking)]
        if asking < end:
            self.spans += [(asking, text.prompt), (text.prompt, end)]
        before = asking if inputs.attention_alone else 0
        self.first = [0, *(before for _ in self.spans[1:])]

    @cached_property
    def passes(self) -> list[Suffix]:
        """One for each span; none is run where an earlier run probed all layers."""
        rows = compared_rows(self.text, ROWS)
        return [Suffix(self.inputs.model, self.text.ids, rows, start) for start in self.first]

    @cached_property
    def full(self) -> list[torch.Tensor]:
        """Logits of full attention, of each span's rows."""
        return [each.logits() for each in self.passes]

    def layer(self, layer: int, masks: list[MaskSet]) -> np.ndarray:
        """Mean KL of a layer's heads, each alone and all together, [probes, parts, kv_heads + 1].

        Args:
            layer: global index, no less than in the call before.
            masks: of the probes.

        Returns:
            NaN where heads are not probed alone.

        Raises:
            CalibrationStopped: if the caller wants to stop.
        """
        page, full = self.inputs.config.page, self.full
        found = np.zeros((len(masks), len(PARTS), self.inputs.shape.kv_heads + 1))
        for part, (span, each) in enumerate(zip(self.spans, self.passes, strict=True)):
            each.skip(layer)
            heads = self._heads(part)
            found[:, part, : heads.start] = np.nan
            for index, head in product(range(len(masks)), heads):
                single = alone(masks[index], layer, head)
                with hooked(Simulation(single, page, self.text.prompt, span)):
                    other = each.logits()
                found[index, part, head] = mean_kl(full[part], other)
                self._advance(part, layer)
        return found

    def _heads(self, part: int) -> range:
        """Heads that are probed, the number of heads for all together.

        What errs in a question's context hardly ever meets its reply (in the demo model under .002
        nats a layer, where rows that look back cause up to 1.9): whole layers tell enough of it.
        """
        heads = self.inputs.shape.kv_heads
        return range(heads if part == 0 and len(self.spans) > 1 else 0, heads + 1)

    def count(self, layer: int, probes: int) -> None:
        """Counts the passes of a layer, which an earlier run did."""
        for part in range(len(self.spans)):
            for _ in range(probes * len(self._heads(part))):
                self._advance(part, layer)

    def _advance(self, part: int, layer: int) -> None:
        self.inputs.advance("probe", self.text.ids[self.first[part] :], layer)


def _text(inputs: FitInputs, texts: list[FitText], kind: str) -> FitText:
    """A kind's text of about the shortest length: probes are many."""
    length = min(inputs.config.lengths)
    mine = [text for text in texts if text.kind == kind]
    return min(mine, key=lambda text: abs(text.prompt - length))
