"""Pages that dynamic candidates choose for some query blocks."""

from collections.abc import Sequence

import torch

from dam_vllm.calibration.fit.candidates import Candidate
from dam_vllm.calibration.fit.rows import by_page, logits
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.budget import PageMasses, choose


def chosen_pages(
    states: LayerStates,
    head: int,
    position: torch.Tensor,
    rotation: torch.Tensor,
    candidates: Sequence[Candidate],
    anyway: torch.Tensor,
    page: int,
) -> torch.Tensor:
    """Chooses pages beyond those that are read anyway.

    Args:
        states: the layer.
        head: KV head.
        position: int64 [query_blocks, queries].
        rotation: [head_size, head_size], the head's basis.
        candidates: dynamic ones.
        anyway: bool [query_blocks, pages].
        page: tokens a page.

    Returns:
        bool [candidates, query_blocks, pages], disjoint from `anyway`.
    """
    own = position[:, -1] // page
    masses: dict[int, PageMasses] = {}
    found = []
    for candidate in candidates:
        channels, budget = candidate.channels, candidate.budget
        assert channels is not None
        assert budget is not None
        if channels not in masses:
            each = logits(states, head, position, rotation, channels)
            max_scores = by_page(each, page, float("-inf")).amax(dim=-1)
            mass = max_scores.permute(2, 0, 1).softmax(dim=0)
            masses[channels] = PageMasses.of(mass, anyway, own)
        found.append(choose(masses[channels], [budget]))
    return torch.stack(found)
