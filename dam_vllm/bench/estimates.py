"""Estimates of what pages that are not read would add to a head's output."""

import math
from dataclasses import replace
from enum import StrEnum

import numpy as np
import torch

from dam_vllm.calibration.fit import simulate
from dam_vllm.calibration.fit.simulate import Simulation, full_attention, masked_scores
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import BoolArray, HeadMode, MaskSet

TRADE_STEP = 16  # every so many rows' errors decide whether a head trades its pages


class Estimate(StrEnum):
    """What stands for pages that are not read.

    Attributes:
        NONE: nothing, as served.
        TAIL: each whole page before the query's own is one token, its mean key and mean value,
            which counts as often as the page has tokens.
        DELTA: every `period`-th query of the prompt reads everything; what that changes is added to
            the queries from it to the next such one (Delta attention, arXiv 2505.11254).
        BOTH: TAIL, and DELTA for what is left.
        TRADE: TAIL, and heads whose tail is worth more than their pages read none but the first
            and the query block's own.
    """

    NONE = "none"
    TAIL = "tail"
    DELTA = "delta"
    BOTH = "both"
    TRADE = "trade"


class Estimated(Simulation):
    """Hook that corrects sparse attention by an estimate of what is not read.

    Args:
        masks: the mask set.
        page: tokens a page.
        prompt: tokens of the prompt.
        compared: see `Simulation`.
        tail: bool [layers, kv_heads], heads that have a tail.
        period: every so many queries of the prompt read everything; 0 for none.
    """

    def __init__(
        self,
        masks: MaskSet,
        page: int,
        prompt: int,
        compared: list[int] | None,
        tail: BoolArray,
        period: int,
    ) -> None:
        super().__init__(masks, page, prompt, compared=compared)
        self.tail, self.period = tail, period
        # Of each sparse head, over the causal pages of all tokens.
        self.read = np.ones(masks.modes.shape)
        self.extra = np.zeros(masks.modes.shape)

    def output(
        self, states: LayerStates, head: int, rows: torch.Tensor, pages: torch.Tensor
    ) -> torch.Tensor:
        self._count(states.layer, head, pages)
        found = super().output(states, head, rows, pages)
        prompt = rows < self.prompt
        if not self.period or not prompt.any():
            return found
        first = rows[prompt] // self.period * self.period
        dense, which = first.unique(return_inverse=True)
        delta = torch.cat(
            [full_attention(states, head, some) for some in dense.split(simulate.ROWS)], dim=1
        )
        delta -= super().output(states, head, dense, pages)
        found[:, prompt] += delta[:, which]
        return found

    def attend(
        self, states: LayerStates, head: int, rows: torch.Tensor, pages: torch.Tensor
    ) -> torch.Tensor:
        if not self.tail[states.layer, head]:
            return super().attend(states, head, rows, pages)
        keys, mask = self.keys_read(rows, pages)
        scores = masked_scores(states, head, rows, states.key[head, keys], mask)
        whole = int(rows[-1]) // self.page
        key, value = (
            each[head, : whole * self.page].unflatten(0, (whole, self.page)).mean(dim=1)
            for each in (states.key, states.value)
        )
        unread = ~pages[:, :whole] & (torch.arange(whole) < (rows // self.page)[:, None])
        tail = masked_scores(states, head, rows, key, unread) + math.log(self.page)
        weights = torch.cat([scores, tail], dim=-1).softmax(dim=-1)
        return weights @ torch.cat([states.value[head, keys], value])

    def _count(self, layer: int, head: int, pages: torch.Tensor) -> None:
        """Counts what a head reads, and what its estimate costs, in units of dense attention."""
        own = torch.arange(len(pages)) // self.page
        seen = pages & (torch.arange(pages.shape[1]) <= own[:, None])
        causal, read = int((own + 1).sum()), int(seen.sum())
        self.read[layer, head] = read / causal
        if self.tail[layer, head]:
            self.extra[layer, head] = (1 - read / causal) / self.page
        if self.period:
            self.extra[layer, head] += (1 - read / causal) / self.period


class TradeErrors(Simulation):
    """Hook that measures each sparse head's error with its pages, and with a tail in their place.

    Attributes:
        kept: float64 [layers, kv_heads], squared errors of the output under the masks.
        traded: the same where only the first page and the query block's own are read, with a tail.
    """

    def __init__(self, masks: MaskSet, page: int, prompt: int) -> None:
        super().__init__(masks, page, prompt)
        every = np.ones(masks.modes.shape, dtype=bool)
        self._bare = Estimated(bare(masks, every), page, prompt, None, every, 0)
        self.kept, self.traded = np.zeros(every.shape), np.zeros(every.shape)

    def output(
        self, states: LayerStates, head: int, rows: torch.Tensor, pages: torch.Tensor
    ) -> torch.Tensor:
        """Full attention, so that each head is measured for itself."""
        full = torch.cat(
            [full_attention(states, head, some) for some in rows.split(simulate.ROWS)], dim=1
        )
        some = rows[::TRADE_STEP]
        kept = super().output(states, head, some, pages)
        bare = self._bare.output(states, head, some, self._bare.pages(states, head))
        for errors, found in ((self.kept, kept), (self.traded, bare)):
            errors[states.layer, head] += float((found - full[:, ::TRADE_STEP]).square().sum())
        return full


def bare(masks: MaskSet, heads: BoolArray) -> MaskSet:
    """Masks whose heads of bool [layers, kv_heads] read the first and own pages alone."""
    each = heads.repeat(masks.heads // masks.kv_heads, axis=1)[..., None]
    modes = np.where(heads, np.uint8(HeadMode.STATIC), masks.modes)
    anchors = None
    if masks.anchors is not None and (modes == HeadMode.REUSE).any():
        anchors = np.where(heads[..., None], np.int32(-1), masks.anchors)
    return replace(
        masks,
        columns=masks.columns & ~each,
        diagonals=masks.diagonals & ~each,
        true_bits=np.where(each, np.uint8(0), masks.true_bits),
        modes=modes,
        anchors=anchors,
    )


def trading(errors: TradeErrors) -> BoolArray:
    """Sparse heads that err less by a tail than by their pages, bool [layers, kv_heads].

    Anchors keep their pages for heads that go on reading them.
    """
    masks = errors.masks
    trades = (errors.traded < errors.kept) & (masks.modes != HeadMode.DENSE)
    for layer, head in np.argwhere((masks.modes == HeadMode.REUSE) & ~trades):
        trades[masks.anchor(layer, head)] = False
    return trades
