"""Heads whose pages depend on queries: what a step plans for those of all layers at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from dam_vllm.attention.cpu.kernel import CPULayer
from dam_vllm.attention.cpu.select import Asking
from dam_vllm.attention.page_counts import QueryWeights
from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.page_tables import PageSelector


@dataclass(frozen=True)
class Choosing:
    """A step's plan for these heads.

    Attributes:
        asking: the queries cut at pages.
        static: bool [heads of all layers, query blocks, pages], what they read anyway.
        weights: how much query blocks count, or None where nothing is counted.
    """

    asking: Asking
    static: torch.Tensor
    weights: QueryWeights | None


@dataclass(frozen=True)
class ChoosingHeads:
    """The dynamic and reusing heads of some layers.

    Attributes:
        heads: int64 by layer name, local KV heads: dynamic ones, then reusing ones.
        rows: by layer name, where a layer's heads stand among all.
        tables: page tables of all, as if of one layer.
    """

    heads: Mapping[str, torch.Tensor]
    rows: Mapping[str, slice]
    tables: PageSelector

    @classmethod
    def of(cls, layers: Mapping[str, CPULayer]) -> Self | None:
        """Those of layers by name, or None without any."""
        heads, rows, tables, first = {}, {}, [], 0
        for name, layer in layers.items():
            heads[name] = torch.tensor(layer.choosing)
            rows[name] = slice(first, first + len(layer.choosing))
            first = rows[name].stop
            kinds = (layer.dynamic, layer.reusing)
            tables += [kind.static for kind in kinds if kind is not None]
        return cls(heads, rows, PageSelector.joined(tables)) if tables else None

    def plan(self, query_blocks: QueryBlocks, weights: QueryWeights | None) -> Choosing:
        """The plan of a step, cut at pages."""
        asking = Asking.of(query_blocks)
        return Choosing(asking, self.tables.select(query_blocks.index, asking.pages)[0], weights)
