"""Heads are probed: what the next token loses where one head, or one layer, is sparse."""

import numpy as np

from dam_vllm.calibration.fitting.assemble import assemble
from dam_vllm.calibration.fitting.candidates import Candidate
from dam_vllm.calibration.fitting.inputs import FitInputs, compared_rows, probe_length
from dam_vllm.calibration.fitting.sensitivity import alone, mean_kl
from dam_vllm.calibration.fitting.simulate import Simulation
from dam_vllm.calibration.fitting.states import hooked, run
from dam_vllm.calibration.fitting.texts import FitText
from dam_vllm.masks.dynamic import BudgetKind
from dam_vllm.masks.mask_set import FloatArray

BARE = 0
PAGES = 4
ROWS = 256


def probes(candidates: list[Candidate]) -> list[int]:
    """The candidates that heads are probed with: nothing, and few pages by the middle rank."""
    ranks = sorted({each.rank for each in candidates if each.rank is not None})
    wanted = (ranks[len(ranks) // 2], BudgetKind.COUNT, PAGES)
    few = next(
        index
        for index, each in enumerate(candidates)
        if each.budget and (each.rank, each.budget.kind, each.budget.value) == wanted
    )
    return [BARE, few]


def probe(
    inputs: FitInputs,
    candidates: list[Candidate],
    rotations: FloatArray,
    texts: list[FitText],
    kinds: list[str],
) -> np.ndarray:
    """Runs every probe on every head alone and on all of a layer's heads together.

    Context is probed apart from the rows that look back, those that end a question and its reply.

    Args:
        inputs: of the fit.
        candidates: all candidates.
        rotations: float32 [layers, kv_heads, head_size, head_size].
        texts: one of each kind is used.
        kinds: kinds of text.

    Returns:
        Mean KL float64 [probes, 2, layers, kinds, kv_heads + 1]: context, then rows that look
        back; the whole layer's last.

    Raises:
        CalibrationStopped: if the caller stopped it; the store holds the finished layers.
    """
    shape, page = inputs.shape, inputs.config.page
    size = (len(shape.layer_types), shape.kv_heads)
    masks = [
        assemble(
            inputs.patterns, candidates, np.full(size, index), rotations,
            np.zeros((*size, len(candidates))), page,
        )
        for index in probes(candidates)
    ]  # fmt: skip
    probed = [_text(inputs, texts, kind) for kind in kinds]
    rows = [compared_rows(text, ROWS) for text in probed]
    full = [run(inputs.model, text.ids, each) for text, each in zip(probed, rows, strict=True)]
    kls = np.zeros((len(masks), 2, size[0], len(kinds), shape.kv_heads + 1))
    for layer in inputs.layers:
        stored = inputs.store.probes(layer)
        if stored is not None:
            kls[:, :, layer] = stored
        for index, head in np.ndindex(len(masks), shape.kv_heads + 1):
            single = alone(masks[index], layer, head)
            for kind, text in enumerate(probed):
                for part, span in enumerate(_spans(text, page)):
                    if stored is None:
                        with hooked(Simulation(single, page, text.prompt, span)):
                            found = run(inputs.model, text.ids, rows[kind])
                        kls[index, part, layer, kind, head] = mean_kl(full[kind], found)
                    inputs.advance("probe", text.ids)
        inputs.store.save_probes(layer, kls[:, :, layer])
    return kls


def _spans(text: FitText, page: int) -> list[tuple[int, int]]:
    """Rows of context, and of question and reply where there are any."""
    asking, end = text.asking(page), len(text.ids)
    return [(0, asking)] if asking == end else [(0, asking), (asking, end)]


def _text(inputs: FitInputs, texts: list[FitText], kind: str) -> FitText:
    """A kind's text whose length is nearest to the one for probes."""
    length = probe_length(inputs.config)
    mine = [text for text in texts if text.kind == kind]
    return min(mine, key=lambda text: abs(text.prompt - length))
