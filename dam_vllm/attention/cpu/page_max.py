"""Largest scores of pages, compiled: token scores never leave registers.

Lanes of a vector are rows of queries, so that a page's maximum needs no reduction over lanes and a
row's result depends on nothing else. On an EPYC of the fourth generation (AVX-512), for 1024 rows,
16 channels and 16384 keys on one core: 10 ms by torch's product and maximum, 4.9 in float32, the
processor's peak, and 2.5 in bfloat16 with `vdpbf16ps`, which adds up exact products in float32.
"""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn.functional import pad

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.page_mass import compiled_masses
from dam_vllm.attention.cpu.page_max_text import Types, body, own_body
from dam_vllm.attention.cpu.span import Span
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.masks.budget import PageMasses

ARGUMENTS = {"query": "ptr", "keys": "ptr", "result": "ptr", "pages": "i64", "rows": "i64"}
OWN_ARGUMENTS = {
    "query": "ptr", "keys": "ptr", "result": "ptr", "places": "ptr", "first": "i64", "each": "i64",
    "rows": "i64",
}  # fmt: skip


@dataclass(frozen=True)
class CompiledScores:
    """Scores many rows over the same keys; made by `of`.

    Attributes:
        function: `page_max`.
        own: `own_page_max`.
        pairs: whether products are of pairs of bfloat16 channels, else of float32 ones.
        whole_spans: see `SpanScores`.
    """

    function: llvm.Compiled
    own: llvm.Compiled
    pairs: bool
    whole_spans = False

    @classmethod
    @functools.cache
    def of(cls, channels: int, page: int, dtype: torch.dtype) -> Self:
        """Compiles for a number of channels and a page of a multiple of TOKENS tokens.

        Args:
            channels: that score.
            page: tokens a page.
            dtype: of queries and keys as the model computes them; where that is bfloat16 and the
                processor has products of it, they are taken, which lose nothing.
        """
        pairs = dtype is torch.bfloat16 and llvm.has("avx512bf16")
        types = Types(llvm.lanes(), pairs)
        depth = types.depth(channels)
        text = types.declaration
        return cls(
            llvm.compiled("page_max", ARGUMENTS, text, body(depth, page, types)),
            llvm.compiled("own_page_max", OWN_ARGUMENTS, text, own_body(depth, page, types)),
            pairs,
        )

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys as the function takes them.

        Args:
            keys: float32 [pages, channels, page].

        Returns:
            float32 likewise, or int32 [pages, pairs of channels, page].
        """
        if not self.pairs:
            return keys.contiguous()
        paired = pad(keys, (0, 0, 0, keys.shape[1] % 2)).unflatten(1, (-1, 2)).transpose(2, 3)
        packed = paired.to(torch.bfloat16, memory_format=torch.contiguous_format)
        return packed.view(torch.int32)[..., 0]

    def max_scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The largest score of each row in each page.

        Args:
            query: float32 [rows, channels].
            keys: of `keys`, the first dimension cut as wanted.

        Returns:
            float32 [vectors, pages, lanes]: the rows in order, filled up to whole vectors. So what
            follows goes over all pages of a vector of rows, which lie together in the cache.
        """
        return self._max_scores(self._by_channel(query), keys)

    def masses(
        self, query: torch.Tensor, keys: torch.Tensor, span: Span, dynamic: DynamicHeads
    ) -> PageMasses:
        """See `SpanScores.masses`."""
        by_channel = self._by_channel(query.flatten(0, 2))
        own = torch.empty(by_channel.shape[1])
        places = torch.arange(query.shape[1], dtype=torch.int32).repeat_interleave(query.shape[2])
        given = (each.data_ptr() for each in (by_channel, keys, own, places))
        self.own.call(*given, int(span.index[0]), len(places), len(own))
        scores = self._max_scores(by_channel, keys)
        return compiled_masses(scores, own, span, dynamic.scale, dynamic.softcap)

    def _by_channel(self, query: torch.Tensor) -> torch.Tensor:
        """Float32 rows as the functions take them: [channels or pairs, rows], whole vectors."""
        rows, channels = query.shape
        query = pad(query, (0, channels % 2 if self.pairs else 0, 0, -rows % llvm.lanes()))
        if self.pairs:
            query = query.to(torch.bfloat16).view(torch.int32)
        return query.t().contiguous()

    def _max_scores(self, by_channel: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        result = torch.empty(by_channel.shape[1] // llvm.lanes(), len(keys), llvm.lanes())
        places = (each.data_ptr() for each in (by_channel, keys, result))
        self.function.call(*places, len(keys), by_channel.shape[1])
        return result
