"""Tails of the heads of some layers: which have one, and the means that stand for spans."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.kernel import CPULayer, VirtualBatch
from dam_vllm.attention.cpu.plan import VirtualPages
from dam_vllm.attention.cpu.span_means import EndedSpans, write_means
from dam_vllm.attention.cpu.tail import add_tail
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.span_means import SpanMeans
from dam_vllm.masks.mask_set import BoolArray
from dam_vllm.masks.page_tables import PageSelector


@dataclass(frozen=True)
class LayerTails:
    """Heads with a tail.

    Attributes:
        heads: int64 by layer name, local KV heads; of layers that have any.
        fixed: bool [layers, heads], those whose pages are known without queries.
        choosing: by layer name bool [1, choosing heads], which of the others, in their order.
        page: tokens a page.
        layout: of the caches.
        means: of the spans in them.
    """

    heads: Mapping[str, torch.Tensor]
    fixed: BoolArray
    choosing: Mapping[str, BoolArray]
    page: int
    layout: KVLayout
    means: SpanMeans

    @classmethod
    def of(cls, layers: Mapping[str, CPULayer], selector: PageSelector, layout: KVLayout) -> Self:
        """Those of layers by name, in the selector's order."""
        heads = {name: torch.tensor(each.tails) for name, each in layers.items() if each.tails}
        fixed = np.zeros((selector.layers, selector.heads), dtype=bool)
        for row, layer in enumerate(layers.values()):
            fixed[row, [head for head in layer.tails if head in layer.fixed]] = True
        choosing = {name: np.isin(each.choosing, each.tails)[None] for name, each in layers.items()}
        return cls(heads, fixed, choosing, selector.page, layout, SpanMeans())

    def ended(self, step: Step) -> EndedSpans | None:
        """Spans whose means a step writes."""
        return EndedSpans.of(step, self.page) if self.heads else None

    def write(
        self, ended: EndedSpans, where: VirtualPages, cache: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Writes means of a layer's spans, those of the pages of `heads`."""
        spans = where.tables()[0][:, ended.request, ended.pages]
        write_means(self._means(cache, dtype), cache, spans.flatten(0, 1), self.layout)

    def _means(self, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Means beside a cache, [virtual pages, 2, head_size]."""
        return self.means.of(self.layout.keys_and_values(cache)[0], dtype)

    def add(
        self,
        layer: CPULayer,
        batch: VirtualBatch,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Adds what a batch's sequences do not read to their output, as `PagedKernel` has it."""
        if batch.unread is not None:
            keys = CachedKeys(self.layout.channels(cache), self.layout.stored)
            means = self._means(cache, query.dtype)
            add_tail(layer, batch, batch.unread, query, keys, means, output)
