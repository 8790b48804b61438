"""What a KV head loses that reads, beside its own static pages, those that its anchor chose."""

import numpy as np
import torch

from dam_vllm.calibration.fit.anchors import NONE
from dam_vllm.calibration.fit.candidates import Candidate, LayerPatterns
from dam_vllm.calibration.fit.choices import chosen_pages
from dam_vllm.calibration.fit.losses import Block, Sums
from dam_vllm.calibration.fit.probes import relative_errors, worst_by_part
from dam_vllm.calibration.fit.rows import split_rows
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import FloatArray


def worth_trying(
    sums: Sums, costs: np.ndarray, candidates: list[Candidate], most: int
) -> np.ndarray:
    """Candidates of an anchor that no other one beats in cost and in every part's error.

    Args:
        sums: of all texts.
        costs: [layers, kv_heads, candidates].
        candidates: all of them; static ones choose nothing.
        most: how many are tried at most; they are spread evenly over cost.

    Returns:
        bool [layers, kv_heads, candidates].
    """
    errors = worst_by_part(relative_errors(sums)[0], sums.strata).max(axis=2)
    dynamic = np.array([each.budget is not None for each in candidates])
    measures = np.concatenate([errors, costs[None]])
    no_worse = (measures[..., :, None] <= measures[..., None, :]).all(axis=0)
    better = no_worse & (measures[..., :, None] < measures[..., None, :]).any(axis=0)
    tried = dynamic & ~(better & dynamic[:, None]).any(axis=2)
    for at in np.ndindex(tried.shape[:2]):
        (index,) = tried[at].nonzero()
        if len(index) > most:
            ordered = index[costs[at][index].argsort()]
            kept = np.linspace(0, len(index) - 1, most).round().astype(int)
            tried[at] = False
            tried[at][ordered[kept]] = True
    return tried


class TextFollowers:
    """Hook that measures the readers of every layer on one text.

    Args:
        error: float64 [2, layers, strata, kv_heads, slots, candidates], where squared errors of
            readers are added, by their anchor's candidate, without a tail and with one.
        blocks: rows of the text.
        patterns: of each full-attention layer.
        candidates: all of them.
        anchors: int [layers * kv_heads, slots], of `anchors.slots`.
        tried: bool [layers, kv_heads, candidates], what anchors choose by.
        rotations: float32 [layers, kv_heads, head_size, head_size].
        page: tokens a page.
    """

    def __init__(
        self,
        error: np.ndarray,
        blocks: list[Block],
        patterns: dict[int, LayerPatterns],
        candidates: list[Candidate],
        anchors: np.ndarray,
        tried: np.ndarray,
        rotations: FloatArray,
        page: int,
    ) -> None:
        self.error, self.blocks, self.patterns, self.page = error, blocks, patterns, page
        self.candidates, self.anchors = candidates, anchors
        self.tried = tried.reshape(-1, tried.shape[-1])
        self.rotations = torch.from_numpy(rotations)
        self._used = set(anchors[anchors != NONE].tolist())
        # For each block, what anchors so far chose, bool [tried, query_blocks, pages].
        self._chosen: list[dict[int, torch.Tensor]] = [{} for _ in blocks]

    def __call__(self, states: LayerStates) -> None:
        if states.layer not in self.patterns:
            return
        kv_heads = len(states.key)
        first = states.layer * kv_heads
        for block, chosen in zip(self.blocks, self._chosen, strict=True):
            own = block.position[:, -1] // self.page
            anyway = self.patterns[states.layer].dynamic.select(own, int(own.max()) + 1)[0]
            for head in range(kv_heads):
                if first + head in self._used:
                    chosen[first + head] = self._choose(states, head, block, anyway[head])
            for head in range(kv_heads):
                self._read(states, head, block, chosen, anyway[head])

    def _read(
        self,
        states: LayerStates,
        head: int,
        block: Block,
        chosen: dict[int, torch.Tensor],
        anyway: torch.Tensor,
    ) -> None:
        """Adds a reader's errors under all candidates of its anchors."""
        anchors = self.anchors[states.layer * len(states.key) + head].tolist()
        if anchors[0] == NONE:
            return
        rows = split_rows(states, head, block.position, self.page)
        for slot, anchor in enumerate(anchors):
            if anchor != NONE:
                error = rows.errors(chosen[anchor] | anyway)
                at = (slice(None), states.layer, block.stratum, head, slot)
                self.error[at][:, self.tried[anchor]] += error.cpu().numpy()

    def _choose(
        self, states: LayerStates, head: int, block: Block, anyway: torch.Tensor
    ) -> torch.Tensor:
        flat = states.layer * len(states.key) + head
        tried = [self.candidates[index] for index in self.tried[flat].nonzero()[0]]
        rotation = self.rotations[states.layer, head]
        return chosen_pages(states, head, block.position, rotation, tried, anyway, self.page)
