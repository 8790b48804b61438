"""What heads may become, with predicted risks, densities and costs."""

from collections.abc import Sequence

import numpy as np

from dam_vllm.calibration.fit.anchors import NONE
from dam_vllm.calibration.fit.candidates import Candidate, LayerPatterns, dynamic_density
from dam_vllm.calibration.fit.losses import Sums
from dam_vllm.calibration.fit.probes import relative_errors, worst_by_part


def densities(
    candidates: Sequence[Candidate],
    patterns: dict[int, LayerPatterns],
    shares: np.ndarray,
    length: int,
    page: int,
) -> np.ndarray:
    """Density of each candidate.

    Args:
        candidates: all of them.
        patterns: of each full-attention layer.
        shares: measured share of the context that each chooses [layers, kv_heads, candidates].
        length: of the prompt, in tokens.
        page: tokens a page.

    Returns:
        float64 [layers, kv_heads, candidates]; 1 in other layers.
    """
    result = np.ones(shares.shape)
    for layer, each in patterns.items():
        static, anyway = each.densities(length, page), each.bare_pages(length, page)
        for index, candidate in enumerate(candidates):
            if candidate.budget is None:
                result[layer, :, index] = static[candidate.pattern]
                continue
            for head, pages in enumerate(anyway):
                share = float(shares[layer, head, index])
                result[layer, head, index] = dynamic_density(candidate.budget, pages, share)
    return result


def read_densities(
    candidates: Sequence[Candidate],
    patterns: dict[int, LayerPatterns],
    shares: np.ndarray,
    anchors: np.ndarray,
    tried: np.ndarray,
    length: int,
    page: int,
) -> np.ndarray:
    """Density of heads that read an anchor's pages: as many as the anchor chooses.

    Args:
        candidates: all of them.
        patterns: of each full-attention layer.
        shares: measured share of the context that each chooses [layers, kv_heads, candidates].
        anchors: int [layers, kv_heads, slots], heads of all layers counted through, or NONE.
        tried: bool [layers, kv_heads, candidates], what anchors choose by.
        length: of the prompt, in tokens.
        page: tokens a page.

    Returns:
        float64 [layers, kv_heads, slots, candidates]; 1 where nothing was measured.
    """
    result = np.ones((*anchors.shape, len(candidates)))
    count = shares.shape[-1]
    flat_shares, flat_tried = shares.reshape(-1, count), tried.reshape(-1, count)
    for layer, each in patterns.items():
        anyway = each.bare_pages(length, page)
        for (head, slot), anchor in np.ndenumerate(anchors[layer]):
            if anchor == NONE:
                continue
            for index in flat_tried[anchor].nonzero()[0]:
                budget = candidates[index].budget
                assert budget is not None
                share = float(flat_shares[anchor, index])
                result[layer, head, slot, index] = dynamic_density(budget, anyway[head], share)
    return result


def risks(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """KL that each candidate is predicted to cause, without a tail and with one.

    Args:
        sums: of all texts.
        weights: KL per squared error [parts, layers, kinds, kv_heads] (`probes.sensitivities`).

    Returns:
        float64 [2, layers, kinds, kv_heads, candidates].
    """
    by_part = worst_by_part(relative_errors(sums), sums.strata)
    return np.asarray((by_part * weights[:, None, ..., None]).sum(axis=0))


def read_risks(
    sums: Sums, error: np.ndarray, anchors: np.ndarray, tried: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """KL that reading an anchor's pages is predicted to cause, see `risks`.

    Args:
        sums: of all texts.
        error: squared errors [2, layers, strata, kv_heads, slots, candidates].
        anchors: int [layers, kv_heads, slots].
        tried: bool [layers, kv_heads, candidates], what anchors choose by.
        weights: as for `risks`.

    Returns:
        float64 [2, layers, kinds, kv_heads, slots, candidates], by the anchor's candidate; inf
        where nothing was measured.
    """
    relative = error / np.maximum(sums.norm, 1e-30)[:, :, None, None, None]
    by_part = worst_by_part(relative.reshape(*error.shape[:4], -1), sums.strata)
    found = (by_part * weights[:, None, ..., None]).sum(axis=0)
    found = found.reshape(*found.shape[:4], *error.shape[4:])
    measured = tried.reshape(-1, tried.shape[-1])[anchors] & (anchors != NONE)[..., None]
    return np.where(measured[:, None], found, np.inf)
