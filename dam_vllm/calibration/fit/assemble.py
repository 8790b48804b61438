"""The fitted mask set: each KV head's mode, pattern, basis and budget."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dam_vllm.calibration.fit.candidates import Candidate, Pattern
from dam_vllm.calibration.fit.curve import DENSE
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.mask_set import FloatArray, HeadMode, MaskSet


def assemble(
    patterns: Sequence[Pattern],
    candidates: Sequence[Candidate],
    chosen: np.ndarray,
    rotations: FloatArray,
    shares: np.ndarray,
    page: int,
) -> MaskSet:
    """Puts the chosen candidates together.

    Args:
        patterns: static patterns, whose masks have one shape.
        candidates: what `chosen` counts.
        chosen: int [layers, kv_heads], candidate, or DENSE.
        rotations: float32 [layers, kv_heads, head_size, head_size].
        shares: float [layers, kv_heads, candidates], measured share of the context that is chosen.
        page: tokens a page that budgets were fitted for.

    Returns:
        The masks; coverage and density are not measured yet.
    """
    fitted = patterns[0].build()
    group = fitted.heads // fitted.kv_heads
    modes = np.full((fitted.layers, fitted.kv_heads), HeadMode.STATIC, dtype=np.uint8)
    dynamic = _none_chosen(fitted, rotations)
    wanted = np.zeros(chosen.shape, dtype=int)
    for at, index in np.ndenumerate(chosen):
        candidate = candidates[max(index, 0)]
        wanted[at] = candidate.pattern
        if index == DENSE:
            modes[at] = HeadMode.DENSE
        elif candidate.budget is not None:
            modes[at] = HeadMode.DYNAMIC
            assert candidate.channels is not None
            share = float(shares[*at, index])
            layer, head = at
            dynamic.put(layer, head, candidate.channels, candidate.budget, share, page)
    for pattern in sorted(set(wanted.flat) - {0}):
        source = patterns[pattern].build()
        heads = np.repeat(wanted == pattern, group, axis=1)
        for name in ("columns", "diagonals", "true_bits"):
            getattr(fitted, name)[heads] = getattr(source, name)[heads]
    has_dynamic = (modes == HeadMode.DYNAMIC).any()
    return replace(fitted, modes=modes, dynamic=dynamic if has_dynamic else None)


def _none_chosen(masks: MaskSet, rotations: FloatArray) -> Dynamic:
    shape = (masks.layers, masks.kv_heads)
    return Dynamic(
        rotations=rotations.astype(np.float32),
        channels=np.ones(shape, dtype=np.int32),
        kinds=np.zeros(shape, dtype=np.uint8),
        budgets=np.zeros(shape, dtype=np.float32),
        floors=np.zeros(shape, dtype=np.int32),
        caps=np.zeros(shape, dtype=np.int32),
        expected=np.zeros(shape, dtype=np.float32),
    )
