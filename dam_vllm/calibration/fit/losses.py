"""The context-aware loss: what a KV head's candidates change in its layer's attention output.

Errors are summed apart for each stratum of rows: a kind of text, its length, and whether the row is
plain context, lies in the page that ends a question, or belongs to the reply. A few rows of a
long text's reply that need something far back then count as much as thousands of rows that look
at their own surroundings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from dam_vllm.calibration.fit.candidates import Candidate, LayerPatterns
from dam_vllm.calibration.fit.choices import chosen_pages
from dam_vllm.calibration.fit.rows import Rows, split_rows
from dam_vllm.calibration.fit.samples import PLAIN, FitText
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import FloatArray

PARTS = CONTEXT, QUESTION, REPLY = "context", "question", "reply"
ARRAYS = ("error", "norm", "chosen", "causal", "alone", "kept")


@dataclass
class Sums:
    """What one text adds; a row of each array is a layer.

    Attributes:
        strata: names "kind/part/length" of the strata of rows.
        error: float64 [2, layers, strata, kv_heads, candidates], squared errors without a tail and
            with one.
        norm: float64 [layers, strata], squared norms of the layer's whole attention output.
        chosen: float64 [layers, kv_heads, candidates], pages chosen in prefill.
        causal: float64 [layers], pages there were to choose from.
        alone: float64 [layers, strata, kv_heads], attention mass in pages that are read anyway,
            summed over rows.
        kept: float64 [layers, strata, kv_heads, layers, kv_heads], the same with the pages that
            each head of the same layer or an earlier one chose under the reference budget.
    """

    strata: list[str]
    error: np.ndarray
    norm: np.ndarray
    chosen: np.ndarray
    causal: np.ndarray
    alone: np.ndarray
    kept: np.ndarray

    @classmethod
    def empty(cls, strata: list[str], layers: int, kv_heads: int, candidates: int) -> "Sums":
        return cls(
            strata,
            np.zeros((2, layers, len(strata), kv_heads, candidates)),
            np.zeros((layers, len(strata))),
            np.zeros((layers, kv_heads, candidates)),
            np.zeros(layers),
            np.zeros((layers, len(strata), kv_heads)),
            np.zeros((layers, len(strata), kv_heads, layers, kv_heads)),
        )

    def add(self, other: "Sums") -> None:
        """Adds another text's sums of the same strata."""
        for name in ARRAYS:
            getattr(self, name)[...] += getattr(other, name)


def stratum_names(texts: Sequence[FitText], lengths: Sequence[int]) -> list[str]:
    """All strata of some texts' rows.

    Args:
        texts: the texts.
        lengths: that those with a question were made for.

    Returns:
        Names, in order of the texts.
    """
    parts = {PLAIN: (CONTEXT,)}
    return list(
        dict.fromkeys(
            _stratum(text, part, lengths)
            for text in texts
            for part in parts.get(text.kind, (CONTEXT, QUESTION, REPLY))
        )
    )


def _stratum(text: FitText, part: str, lengths: Sequence[int]) -> str:
    if text.kind == PLAIN:
        return f"{text.kind}/{part}/any"
    nearest = min(lengths, key=lambda length: abs(length - text.prompt))
    return f"{text.kind}/{part}/{nearest}"


@dataclass(frozen=True)
class Block:
    """Rows that are looked at together.

    Attributes:
        stratum: index of their stratum.
        position: int64 [query_blocks, queries]; dynamic heads choose for each query block.
        counted: whether the chosen pages count for the density of prefill.
    """

    stratum: int
    position: torch.Tensor
    counted: bool

    def split(self, most: int) -> list["Block"]:
        """Blocks of at most so many query blocks."""
        return [replace(self, position=part) for part in self.position.split(most)]


class TextLosses:
    """Hook that measures all candidates of every layer on one text.

    Beside, it measures what the pages that one head chooses keep of another's attention: which
    heads could read each other's pages.

    Args:
        sums: where to add.
        blocks: rows of the text.
        patterns: of each full-attention layer.
        candidates: all of them.
        reference: the candidate by which heads choose for one another.
        rotations: float32 [layers, kv_heads, head_size, head_size].
        page: tokens a page.
    """

    def __init__(
        self,
        sums: Sums,
        blocks: list[Block],
        patterns: dict[int, LayerPatterns],
        candidates: list[Candidate],
        reference: int,
        rotations: FloatArray,
        page: int,
    ) -> None:
        self.sums, self.blocks, self.page = sums, blocks, page
        self.patterns, self.candidates, self.reference = patterns, candidates, reference
        self.rotations = torch.from_numpy(rotations)
        # For each block, the pages that heads of the layers so far chose by the reference.
        self._layers: list[int] = []
        self._chosen: list[list[torch.Tensor]] = [[] for _ in blocks]

    def __call__(self, states: LayerStates) -> None:
        if states.layer not in self.patterns:
            return
        self._layers.append(states.layer)
        for block, chosen in zip(self.blocks, self._chosen, strict=True):
            measured = [self._measure(states, head, block) for head in range(len(states.key))]
            chosen.append(torch.stack([pages for pages, _, _ in measured]))
            for head, (_, anyway, mass) in enumerate(measured):
                self._compare(states.layer, head, block.stratum, torch.stack(chosen), anyway, mass)

    def _measure(
        self, states: LayerStates, head: int, block: Block
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds the errors of a head's candidates.

        Returns:
            Its pages chosen by the reference, those that it reads anyway, bool [query_blocks,
            pages], and its attention mass in each page, summed over rows.
        """
        layer, sums = states.layer, self.sums
        rows = split_rows(states, head, block.position, self.page)
        anyway, selected = self._selections(states, head, block)
        sums.error[:, layer, block.stratum, head] += rows.errors(selected).cpu().numpy()
        sums.norm[layer, block.stratum] += float(rows.full.double().square().sum())
        return selected[self.reference] & ~anyway, anyway, _shares(rows)

    def _compare(
        self,
        layer: int,
        head: int,
        stratum: int,
        chosen: torch.Tensor,
        anyway: torch.Tensor,
        mass: torch.Tensor,
    ) -> None:
        """Adds what the pages chosen [layers so far, kv_heads, ...] keep of a head's mass."""
        alone = float(mass[anyway].sum())
        far = mass.masked_fill(anyway, 0.0)
        kept = alone + chosen.to(far.dtype).flatten(2) @ far.flatten()
        self.sums.alone[layer, stratum, head] += alone
        self.sums.kept[layer, stratum, head, self._layers] += kept.cpu().numpy()

    def _selections(
        self, states: LayerStates, head: int, block: Block
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages read anyway, bool [query_blocks, pages], and under each candidate, before them."""
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
        dynamic = [index for index, each in enumerate(self.candidates) if each.budget is not None]
        rotation = self.rotations[states.layer, head]
        tried = [self.candidates[index] for index in dynamic]
        chosen = chosen_pages(states, head, position, rotation, tried, anyway, page)
        if block.counted:
            counts = chosen.sum(dim=(1, 2)).cpu().numpy()
            self.sums.chosen[states.layer, head, dynamic] += counts
            if head == 0:
                self.sums.causal[states.layer] += int((own + 1).sum())
        selected = static[[each.pattern for each in self.candidates]]
        selected[dynamic] = chosen | anyway
        return anyway, selected


def _shares(rows: Rows) -> torch.Tensor:
    """Share of each row's attention mass in each page, summed over rows [query_blocks, pages]."""
    return (rows.mass / rows.mass.sum(dim=1, keepdim=True)).sum(dim=2)


def text_blocks(
    text: FitText,
    strata: list[str],
    lengths: Sequence[int],
    query_blocks: int,
    page: int,
    query_block: int,
    rng: np.random.Generator,
) -> list[Block]:
    """Chooses the rows of a text that are measured.

    Args:
        text: the text.
        strata: names of all strata.
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
    context = strata.index(_stratum(text, CONTEXT, lengths))
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
        blocks.append(Block(strata.index(_stratum(text, QUESTION, lengths)), last, False))
        reply = strata.index(_stratum(text, REPLY, lengths))
        # A static query block's selection holds for all of its rows, so rows are cut at query
        # blocks.
        for start in range(text.prompt // query_block * query_block, len(text.ids), query_block):
            rows = torch.arange(max(start, text.prompt), min(start + query_block, len(text.ids)))
            if len(rows):
                blocks.append(Block(reply, rows[:, None], False))
    return blocks
