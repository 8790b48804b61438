"""Estimates of what pages that are not read would add to a head's output."""

from dataclasses import replace
from enum import StrEnum

import numpy as np
import torch

from dam_vllm.calibration.fit import simulate
from dam_vllm.calibration.fit.simulate import Simulation, full_attention
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.tails import unread_spans


class Estimate(StrEnum):
    """What stands for pages that are not read.

    Attributes:
        NONE: nothing.
        FITTED: tails of the heads for which the masks have them, as served.
        TAIL: tails of all heads (`dam_vllm.masks.tails`).
        DELTA: every `period`-th query of the prompt reads everything; what that changes is added to
            the queries from it to the next such one (Delta attention, arXiv 2505.11254).
        BOTH: TAIL, and DELTA for what is left.
    """

    NONE = "none"
    FITTED = "fitted"
    TAIL = "tail"
    DELTA = "delta"
    BOTH = "both"

    def tails(self, masks: MaskSet) -> MaskSet:
        """The masks with the tails that this estimate gives their heads."""
        if self is Estimate.FITTED:
            return masks
        if self in (Estimate.NONE, Estimate.DELTA):
            return replace(masks, tails=None)
        full = np.array([kind == "full" for kind in masks.header.layer_types])
        every = (masks.modes != HeadMode.DENSE) & full[:, None]
        return replace(masks, tails=every.astype(np.uint8))


class Estimated(Simulation):
    """Hook that corrects sparse attention by an estimate of what is not read.

    Args:
        masks: the mask set, whose tails are served.
        page: tokens a page.
        prompt: tokens of the prompt.
        compared: see `Simulation`.
        period: every so many queries of the prompt read everything; 0 for none.
    """

    def __init__(
        self, masks: MaskSet, page: int, prompt: int, compared: list[int] | None, period: int
    ) -> None:
        super().__init__(masks, page, prompt, compared=compared)
        self.period = period
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

    def _count(self, layer: int, head: int, pages: torch.Tensor) -> None:
        """Counts what a head reads, and what its estimate costs, in units of dense attention."""
        own = torch.arange(len(pages)) // self.page
        causal = int((own + 1).sum())
        read = int((pages & (torch.arange(pages.shape[1]) <= own[:, None])).sum()) / causal
        self.read[layer, head] = read
        if self.has_tail(layer, head):
            unread = int(unread_spans(pages, own, self.page).sum())
            self.extra[layer, head] = unread / (causal * self.page)
        if self.period:
            self.extra[layer, head] += (1 - read) / self.period
