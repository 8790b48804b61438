"""Tails, compiled: what rows keep of what they read, and what unread spans add to it.

Two functions, since each is small: one goes over what was read, page after page, the other over
means of spans. Lanes are rows, so that a row's result depends on nothing else.
"""

import functools
from dataclasses import dataclass
from typing import Self

import torch

from dam_vllm.attention.cpu import llvm, read_text, tail_text
from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.page_max_text import Types
from dam_vllm.attention.cpu.row_text import declarations
from dam_vllm.attention.cpu.tail_rows import TailRows
from dam_vllm.masks.rounding import ceil_div

READ_ARGUMENTS = {
    "query": "ptr", "positions": "ptr", "first": "ptr", "table": "ptr", "counts": "ptr",
    "cache": "ptr", "numbers": "ptr", "unpacked": "ptr", "tops": "ptr", "totals": "ptr",
    "sequences": "i64", "width": "i64", "stride": "i64",
}  # fmt: skip
TAIL_ARGUMENTS = {
    "query": "ptr", "first": "ptr", "table": "ptr", "counts": "ptr", "means": "ptr",
    "numbers": "ptr", "unpacked": "ptr", "tops": "ptr", "totals": "ptr", "keep": "ptr",
    "tail": "ptr", "sequences": "i64", "width": "i64", "longest": "i64",
}  # fmt: skip
# Less than any logit.
LOWEST = -1e30


@dataclass(frozen=True)
class CompiledTail:
    """Computes tails of heads; made by `of`.

    Attributes:
        read: `read_mass`.
        tail: `tail_values`.
        types: of their vectors.
    """

    read: llvm.Compiled
    tail: llvm.Compiled
    types: Types

    @classmethod
    @functools.cache
    def of(
        cls, size: int, page: int, dtype: torch.dtype, stored: torch.dtype, capped: bool
    ) -> Self:
        """Compiles for heads of a multiple of 8 channels and pages of a multiple of 16 tokens.

        Args:
            size: channels.
            page: tokens a page.
            dtype: of queries and means; where that is bfloat16 and the processor has products of
                it, they are taken, which lose nothing.
            stored: of the cache, that or fp8.
            capped: whether scores are.
        """
        types = Types(llvm.lanes(), dtype is torch.bfloat16 and llvm.has("avx512bf16"))
        read = read_text.body(size, page, stored, types, capped)
        tail = tail_text.body(size, dtype, types, capped)
        called = declarations(types)
        return cls(
            llvm.compiled("read_mass", READ_ARGUMENTS, called, read),
            llvm.compiled("tail_values", TAIL_ARGUMENTS, called, tail),
            types,
        )

    def shares(
        self,
        query: torch.Tensor,
        rows: TailRows,
        keys: CachedKeys,
        means: torch.Tensor,
        numbers: tuple[float, float, float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `dam_vllm.attention.cpu.tail.torch_shares`."""
        lanes, size, page, count = self.types.lanes, query.shape[1], keys.page, len(rows.pages)
        words = query.view(torch.int32) if self.types.pairs else query.float()
        words = words.view(-1, lanes, words.shape[1]).transpose(1, 2).contiguous()
        tops, totals = torch.full((len(query),), LOWEST), torch.zeros(len(query))
        keep, tail = torch.empty_like(tops), torch.empty(len(query) // lanes, size, lanes)
        given, threads = torch.tensor(numbers), torch.get_num_threads()
        unpacked = torch.empty(threads * page * self.types.depth(size))
        self.read.call(
            *_places(words, rows.position, rows.first, rows.table, rows.pages, keys.pages, given),
            *_places(unpacked, tops, totals),
            count, rows.table.shape[1], keys.pages.stride(0),
        )  # fmt: skip
        width = rows.unread.table.shape[1]
        longest = ceil_div(width, lanes) * lanes
        unpacked = torch.empty(threads * longest * tail_text.room(size, self.types))
        self.tail.call(
            *_places(words, rows.first, rows.unread.table, rows.unread.counts, means, given),
            *_places(unpacked, tops, totals, keep, tail),
            count, width, longest,
        )  # fmt: skip
        return keep, tail.transpose(1, 2).reshape(-1, size)


def _places(*tensors: torch.Tensor) -> list[int]:
    """Their addresses."""
    return [each.data_ptr() for each in tensors]
