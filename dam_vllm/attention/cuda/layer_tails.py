"""A layer's tails: means of spans that end in a step, and tails added to what its heads read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dam_vllm.attention.cuda.bundle import Part
from dam_vllm.attention.cuda.means import write_means
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.tail import Read, Tail
from dam_vllm.attention.span_means import SpanMeans


@dataclass(frozen=True)
class LayerTails:
    """A layer's heads with tails.

    Attributes:
        ids: local KV heads.
        homes: where they lie.
        query_block: tokens a static query block.
        static: of each static set of heads its tail, or None.
        choosing: the tail of choosing heads, or None.
        means: the worker's.
    """

    ids: Sequence[int]
    homes: Homes
    query_block: int
    static: Sequence[Tail | None]
    choosing: Tail | None
    means: SpanMeans

    def write(self, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, part: Part) -> None:
        """Writes means that a part's queries complete; of all parts before any of them is served.

        Args:
            key: [virtual pages, page, head_size], the part's own keys in it.
            value: likewise.
            dtype: of the means.
            part: whose queries.
        """
        means, query_blocks = self.means.of(key, dtype), part.query_blocks[self.query_block]
        write_means(means, key, value, self.homes, query_blocks, part.block_table)

    def add(self, read: Read, key: torch.Tensor, part: Part) -> None:
        """Adds the tails of all heads.

        Args:
            read: of all KV heads of the layer.
            key: as for `write`.
            part: where the queries lie.
        """
        for tail in (*self.static, self.choosing):
            if tail is not None:
                tail.add(read, key, part, gathered=False)
