"""Pages that dynamic candidates choose for some query blocks."""

from collections.abc import Sequence
from functools import cached_property

import torch

from dam_vllm.calibration.fit.candidates import Candidate
from dam_vllm.calibration.fit.rows import by_page, logits
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.budget import PageScores, choose


class _Scores(PageScores):
    """Scores that many budgets choose by: their mass is computed once."""

    @cached_property
    def _mass(self) -> torch.Tensor:
        return super().mass()

    def mass(self) -> torch.Tensor:
        return self._mass


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
    scores: dict[int, PageScores] = {}
    found = []
    for candidate in candidates:
        channels, budget = candidate.channels, candidate.budget
        assert channels is not None
        assert budget is not None
        if channels not in scores:
            each = logits(states, head, position, rotation, channels)
            max_scores = by_page(each, page, float("-inf")).amax(dim=-1)
            scores[channels] = _Scores(max_scores.permute(2, 0, 1).contiguous(), None, own)
        found.append(choose(scores[channels], anyway, [budget]))
    return torch.stack(found)
