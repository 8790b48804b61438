"""Estimates of what pages that are not read would add to a head's output."""

import math
from enum import StrEnum

import numpy as np
import torch

from dam_vllm.calibration.fit import simulate
from dam_vllm.calibration.fit.simulate import Simulation, full_attention, masked_scores
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import MaskSet


class Estimate(StrEnum):
    """What stands for pages that are not read.

    Attributes:
        NONE: nothing, as served.
        TAIL: each span of tokens that ends before the query's page and of which nothing is read is
            one token, its mean key and mean value, which counts as often as it has tokens.
        DELTA: every `period`-th query of the prompt reads everything; what that changes is added to
            the queries from it to the next such one (Delta attention, arXiv 2505.11254).
        BOTH: TAIL, and DELTA for what is left.
    """

    NONE = "none"
    TAIL = "tail"
    DELTA = "delta"
    BOTH = "both"


class Estimated(Simulation):
    """Hook that corrects sparse attention by an estimate of what is not read.

    Args:
        masks: the mask set.
        page: tokens a page.
        prompt: tokens of the prompt.
        compared: see `Simulation`.
        span: tokens that one token of the tail stands for, whole pages; 0 for no tail.
        period: every so many queries of the prompt read everything; 0 for none.
    """

    def __init__(
        self,
        masks: MaskSet,
        page: int,
        prompt: int,
        compared: list[int] | None,
        span: int,
        period: int,
    ) -> None:
        super().__init__(masks, page, prompt, compared=compared)
        self.span, self.period = span, period
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
        if not self.span:
            return super().attend(states, head, rows, pages)
        keys, mask = self.keys_read(rows, pages)
        scores = masked_scores(states, head, rows, states.key[head, keys], mask)
        unread = self._unread(rows, pages)
        spans = unread.shape[1]
        key, value = (
            each[head, : spans * self.span].unflatten(0, (spans, self.span)).mean(dim=1)
            for each in (states.key, states.value)
        )
        tail = masked_scores(states, head, rows, key, unread) + math.log(self.span)
        weights = torch.cat([scores, tail], dim=-1).softmax(dim=-1)
        return weights @ torch.cat([states.value[head, keys], value])

    def _unread(self, rows: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Spans before some queries' own page of which they read nothing: bool [queries, spans]."""
        first = rows // self.page * self.page
        spans = int(first[-1]) // self.span
        size = self.span // self.page
        read = pages[:, : spans * size].unflatten(1, (spans, size)).any(dim=2)
        return ~read & (torch.arange(spans) < (first // self.span)[:, None])

    def _count(self, layer: int, head: int, pages: torch.Tensor) -> None:
        """Counts what a head reads, and what its estimate costs, in units of dense attention."""
        rows = torch.arange(len(pages))
        own = rows // self.page
        causal = int((own + 1).sum())
        read = int((pages & (torch.arange(pages.shape[1]) <= own[:, None])).sum()) / causal
        self.read[layer, head] = read
        if self.span:
            unread = int(self._unread(rows, pages).sum())
            self.extra[layer, head] = unread / (causal * self.page)
        if self.period:
            self.extra[layer, head] += (1 - read) / self.period
