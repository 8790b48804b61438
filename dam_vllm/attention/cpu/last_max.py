"""Largest scores of pages for single queries, compiled: keys and scores stay where they are.

Lanes are tokens of a page, whose keys lie channel by channel in the cache; a page's result depends
on nothing else.
"""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn.functional import pad

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.llvm_text import LOADED, loop, splat, widened
from dam_vllm.masks.rounding import ceil_div

ARGUMENTS = {
    "query": "ptr", "channels": "ptr", "positions": "ptr", "cache": "ptr", "table": "ptr",
    "result": "ptr", "own": "ptr", "pages": "i64", "units": "i64", "width": "i64", "stride": "i64",
}  # fmt: skip


@dataclass(frozen=True)
class LastScores:
    """Scores pages for one query of each of several heads and requests; made by `of`.

    Attributes:
        function: `last_max`.
        rows: of a vector of results that are computed, the others are 0.
        vectors: of results, for all rows of a query.
    """

    function: llvm.Compiled
    rows: int
    vectors: int

    @classmethod
    @functools.cache
    def of(cls, heads_per_kv: int, page: int, dtype: torch.dtype) -> Self:
        """Compiles for query heads a KV head, pages of a multiple of 16 tokens, and a cache."""
        lanes = llvm.lanes()
        rows, vectors = min(heads_per_kv, lanes), ceil_div(heads_per_kv, lanes)
        text = _body(rows, vectors, page, dtype)
        declarations = _declarations(lanes)
        return cls(llvm.compiled("last_max", ARGUMENTS, declarations, text), rows, vectors)

    def max_scores(
        self,
        query: torch.Tensor,
        channels: torch.Tensor,
        position: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest scores of n queries.

        Args:
            query: float32 [n, heads_per_kv, channels].
            channels: int64 [n], leading channels that score.
            position: int64 [n].
            cache: [virtual pages, head_size, page], each contiguous, at any stride.
            table: int32 [n, pages], virtual pages.

        Returns:
            Float32 [n * vectors, pages, lanes] and, of own pages, [n * vectors, lanes]: a query's
            rows in order, then zeros. Own pages and later ones are undefined in the first.
        """
        pages, lanes = table.shape[1], llvm.lanes()
        query = pad(query, (0, 0, 0, self.vectors * self.rows - query.shape[1])).contiguous()
        count = len(query) * self.vectors
        result, own = torch.empty(count, pages, lanes), torch.empty(count, lanes)
        given = (query, channels, position, cache, table.contiguous(), result, own)
        self.function.call(
            *(each.data_ptr() for each in given), pages, count * pages, query.shape[2],
            cache.stride(0),
        )  # fmt: skip
        return result, own


def _declarations(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    return f"""
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})
declare {vector} @llvm.maxnum.v{lanes}f32({vector}, {vector})
declare float @llvm.vector.reduce.fmax.v{lanes}f32({vector})
"""


def _body(rows: int, vectors: int, page: int, dtype: torch.dtype) -> str:
    """LLVM's text of `last_max`: a unit is a vector of results."""
    lanes = llvm.lanes()
    vector, whole, lowest = f"<{lanes} x float>", f"<{lanes} x i32>", float("-inf")
    zeros = f"{whole} zeroinitializer"
    best = [(f"best.{row}", vector, splat(lowest, lanes)) for row in range(rows)]
    return f"""
  br label %each.head
each.head:
  %unit = phi i64 [%thread, %entry], [%unit.next, %each.end]
  %each.more = icmp ult i64 %unit, %units
  br i1 %each.more, label %each.begin, label %done
each.begin:
  %vector = udiv i64 %unit, %pages
  %at = urem i64 %unit, %pages
  %one = udiv i64 %vector, {vectors}
  %position.place = getelementptr i64, ptr %positions, i64 %one
  %position = load i64, ptr %position.place, align 8
  %last = udiv i64 %position, {page}
  %later = icmp ugt i64 %at, %last
  br i1 %later, label %each.end, label %score
score:
  %is.last = icmp eq i64 %at, %last
  %place = urem i64 %position, {page}
  %until = select i1 %is.last, i64 %place, i64 {page - 1}
  %until.short = trunc i64 %until to i32
  %until.first = insertelement {whole} poison, i32 %until.short, i32 0
  %until.all = shufflevector {whole} %until.first, {whole} poison, {zeros}
  %channels.place = getelementptr i64, ptr %channels, i64 %one
  %depth = load i64, ptr %channels.place, align 8
  %line = mul i64 %one, %pages
  %entry.at = add i64 %line, %at
  %entry.place = getelementptr i32, ptr %table, i64 %entry.at
  %id.short = load i32, ptr %entry.place, align 4
  %id = sext i32 %id.short to i64
  %key.at = mul i64 %id, %stride
  %keys = getelementptr {LOADED[dtype]}, ptr %cache, i64 %key.at
  %row.at = mul i64 %vector, {rows}
  %query.at = mul i64 %row.at, %width
  %asked = getelementptr float, ptr %query, i64 %query.at
{loop("tokens", "score", "0", str(page // lanes), _tokens(rows, page, dtype), best, "depth.done")}
{_stored(rows)}
  br label %each.end
each.end:
  %unit.next = add i64 %unit, %threads
  br label %each.head
"""


def _tokens(rows: int, page: int, dtype: torch.dtype) -> str:
    """Scores of a vector of tokens, those that the query sees into %best.R.next."""
    lanes = llvm.lanes()
    vector, whole = f"<{lanes} x float>", f"<{lanes} x i32>"
    sums = [(f"sum.{row}", vector, "zeroinitializer") for row in range(rows)]
    first, zeros = f"<{', '.join(f'i32 {at}' for at in range(lanes))}>", f"{whole} zeroinitializer"
    lines = [
        "%token.short = trunc i64 %token to i32",
        f"%token.first = insertelement {whole} poison, i32 %token.short, i32 0",
        f"%token.all = shufflevector {whole} %token.first, {whole} poison, {zeros}",
        f"%token.each = add {whole} %token.all, {first}",
        f"%seen = icmp sle {whole} %token.each, %until.all",
    ]
    for row in range(rows):
        lines += [
            f"%causal.{row} = select <{lanes} x i1> %seen, {vector} %sum.{row}, "
            f"{vector} {splat(float('-inf'), lanes)}",
            f"%best.{row}.next = call {vector} @llvm.maxnum.v{lanes}f32({vector} %best.{row}, "
            f"{vector} %causal.{row})",
        ]
    told = "\n".join(f"  {line}" for line in lines)
    return f"""
  %token = mul i64 %tokens.at, {lanes}
{loop("depth", "tokens.body", "0", "%depth", _products(rows, page, dtype), sums)}
{told}"""


def _products(rows: int, page: int, dtype: torch.dtype) -> str:
    """One channel's products: %sum.R.next."""
    lanes = llvm.lanes()
    vector, whole = f"<{lanes} x float>", f"<{lanes} x i32>"
    lines = [
        f"%channel.line = mul i64 %depth.at, {page}",
        "%channel.at = add i64 %channel.line, %token",
        f"%key.place = getelementptr {LOADED[dtype]}, ptr %keys, i64 %channel.at",
        widened("key", "%key.place", dtype, lanes),
    ]
    for row in range(rows):
        lines += [
            f"%query.line.{row} = mul i64 %width, {row}",
            f"%query.at.{row} = add i64 %query.line.{row}, %depth.at",
            f"%query.place.{row} = getelementptr float, ptr %asked, i64 %query.at.{row}",
            f"%query.one.{row} = load float, ptr %query.place.{row}, align 4",
            f"%query.first.{row} = insertelement {vector} poison, float %query.one.{row}, i32 0",
            f"%query.{row} = shufflevector {vector} %query.first.{row}, {vector} poison, "
            f"{whole} zeroinitializer",
            f"%sum.{row}.next = call {vector} @llvm.fma.v{lanes}f32({vector} %query.{row}, "
            f"{vector} %key, {vector} %sum.{row})",
        ]
    return "\n".join(f"  {line}" for line in lines)


def _stored(rows: int) -> str:
    """The largest score of each row, stored where the page's belong."""
    lanes = llvm.lanes()
    vector = f"<{lanes} x float>"
    lines, before = [], "zeroinitializer"
    for row in range(rows):
        lines += [
            f"%largest.{row} = call float @llvm.vector.reduce.fmax.v{lanes}f32({vector} "
            f"%best.{row})",
            f"%rows.{row} = insertelement {vector} {before}, float %largest.{row}, i32 {row}",
        ]
        before = f"%rows.{row}"
    lines += [
        f"%result.place = getelementptr {vector}, ptr %result, i64 %unit",
        f"%own.place = getelementptr {vector}, ptr %own, i64 %vector",
        "%target = select i1 %is.last, ptr %own.place, ptr %result.place",
        f"store {vector} {before}, ptr %target, align 4",
    ]
    return "\n".join(f"  {line}" for line in lines)
