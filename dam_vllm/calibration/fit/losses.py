"""The context-aware loss: what a KV head's candidates change in its layer's attention output.

Errors are summed apart for each group of rows: a kind of text, its length, and whether the row is
plain context, lies in the page that ends a question, or belongs to the reply. A few rows of a
long text's reply that need something far back then count as much as thousands of rows that look
at their own surroundings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dam_vllm.calibration.fit.candidates import Candidate, LayerPatterns
from dam_vllm.calibration.fit.rows import by_page, logits, split_rows
from dam_vllm.calibration.fit.samples import PLAIN, FitText
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.budget import PageScores, choose
from dam_vllm.masks.mask_set import FloatArray

CONTEXT, QUESTION, REPLY = "context", "question", "reply"


@dataclass
class Sums:
    """What one text adds; a row of each array is a layer.

    Attributes:
        groups: names "kind/part/length" of the groups of rows.
        error: float64 [layers, groups, kv_heads, candidates], squared errors.
        norm: float64 [layers, groups], squared norms of the layer's whole attention output.
        chosen: float64 [layers, kv_heads, candidates], pages chosen in prefill.
        causal: float64 [layers], pages there were to choose from.
    """

    groups: list[str]
    error: np.ndarray
    norm: np.ndarray
    chosen: np.ndarray
    causal: np.ndarray

    @classmethod
    def empty(cls, groups: list[str], layers: int, kv_heads: int, candidates: int) -> "Sums":
        return cls(
            groups,
            np.zeros((layers, len(groups), kv_heads, candidates)),
            np.zeros((layers, len(groups))),
            np.zeros((layers, kv_heads, candidates)),
            np.zeros(layers),
        )

    def add(self, other: "Sums") -> None:
        """Adds another text's sums of the same groups."""
        for name in ("error", "norm", "chosen", "causal"):
            getattr(self, name)[...] += getattr(other, name)


def group_names(texts: Sequence[FitText], lengths: Sequence[int]) -> list[str]:
    """All groups of some texts' rows.

    Args:
        texts: the texts.
        lengths: that those with a question were made for.

    Returns:
        Names, in order of the texts.
    """
    parts = {PLAIN: (CONTEXT,)}
    return list(
        dict.fromkeys(
            _group(text, part, lengths)
            for text in texts
            for part in parts.get(text.kind, (CONTEXT, QUESTION, REPLY))
        )
    )


def _group(text: FitText, part: str, lengths: Sequence[int]) -> str:
    if text.kind == PLAIN:
        return f"{text.kind}/{part}/any"
    nearest = min(lengths, key=lambda length: abs(length - text.prompt))
    return f"{text.kind}/{part}/{nearest}"


@dataclass(frozen=True)
class Block:
    """Rows that are looked at together.

    Attributes:
        group: index of their group.
        position: int64 [query_blocks, queries]; dynamic heads choose for each query block.
        counted: whether the chosen pages count for the density of prefill.
    """

    group: int
    position: torch.Tensor
    counted: bool


class TextLosses:
    """Hook that measures all candidates of every layer on one text."""

    def __init__(
        self,
        text: FitText,
        sums: Sums,
        blocks: list[Block],
        patterns: dict[int, LayerPatterns],
        candidates: list[Candidate],
        rotations: FloatArray,
        page: int,
    ) -> None:
        self.text, self.sums, self.blocks, self.page = text, sums, blocks, page
        self.patterns, self.candidates = patterns, candidates
        self.rotations = torch.from_numpy(rotations)

    def __call__(self, states: LayerStates) -> None:
        if states.layer not in self.patterns:
            return
        for block in self.blocks:
            for head in range(len(states.key)):
                self._measure(states, head, block)

    def _measure(self, states: LayerStates, head: int, block: Block) -> None:
        layer, sums = states.layer, self.sums
        rows = split_rows(states, head, block.position, self.page)
        selected = self._selections(states, head, block)
        error = rows.errors(selected).double().sum(dim=(1, 2))
        sums.error[layer, block.group, head] += error.cpu().numpy()
        sums.norm[layer, block.group] += float(rows.full.double().square().sum())

    def _selections(self, states: LayerStates, head: int, block: Block) -> torch.Tensor:
        """Pages under each candidate, bool [candidates, query_blocks, pages]."""
        patterns, page = self.patterns[states.layer], self.page
        position = block.position
        own = position[:, -1] // page
        pages = int(own.max()) + 1
        query_block = int(position[0, 0]) // patterns.query_block
        static = patterns.static_pages(
            query_block, max(pages, (query_block + 1) * patterns.query_block // page), head
        )
        static = static[:, None, :pages].expand(-1, len(own), -1)
        anyway = patterns.dynamic.select(own, pages)[0, head]
        rotation = self.rotations[states.layer, head]
        scores: dict[int, PageScores] = {}
        found = []
        for index, candidate in enumerate(self.candidates):
            if candidate.channels is None or candidate.budget is None:
                found.append(static[candidate.pattern])
                continue
            if candidate.channels not in scores:
                each = logits(states, head, position, rotation, candidate.channels)
                max_scores = by_page(each, page, float("-inf")).amax(dim=-1)
                scores[candidate.channels] = PageScores(
                    max_scores.permute(2, 0, 1).contiguous(), None, own
                )
            chosen = choose(scores[candidate.channels], anyway, candidate.budget)
            found.append(chosen | anyway)
            if block.counted:
                self.sums.chosen[states.layer, head, index] += int(chosen.sum())
        if block.counted and head == 0:
            self.sums.causal[states.layer] += int((own + 1).sum())
        return torch.stack(found)


def text_blocks(
    text: FitText,
    groups: list[str],
    lengths: Sequence[int],
    query_blocks: int,
    page: int,
    query_block: int,
    rng: np.random.Generator,
) -> list[Block]:
    """Chooses the rows of a text that are measured.

    Args:
        text: the text.
        groups: names of all groups.
        lengths: that texts with a question were made for.
        query_blocks: static query blocks of context, evenly spread.
        page: tokens a page.
        query_block: tokens a static query block.
        rng: where in its part each query block lies.

    Returns:
        Blocks of context, then the question's last page and the reply's rows, if there are any.
    """
    whole = text.prompt // query_block
    edges = np.linspace(0, whole, min(query_blocks, whole) + 1)
    places = [int(rng.uniform(low, high)) for low, high in pairwise(edges)]
    context = groups.index(_group(text, CONTEXT, lengths))
    blocks = [
        Block(
            context,
            torch.arange(place * query_block, (place + 1) * query_block).view(-1, page),
            True,
        )
        for place in places
    ]
    if text.kind != PLAIN:
        last = torch.arange(text.asking(page), text.prompt)[None]
        blocks.append(Block(groups.index(_group(text, QUESTION, lengths)), last, False))
        reply = groups.index(_group(text, REPLY, lengths))
        # A static query block's selection holds for all of its rows, so rows are cut at query
        # blocks.
        for start in range(text.prompt // query_block * query_block, len(text.ids), query_block):
            rows = torch.arange(max(start, text.prompt), min(start + query_block, len(text.ids)))
            if len(rows):
                blocks.append(Block(reply, rows[:, None], False))
    return blocks
