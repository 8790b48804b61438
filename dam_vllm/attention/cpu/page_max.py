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
from dam_vllm.attention.cpu.span import Span
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.masks.budget import PageMasses
from dam_vllm.masks.rounding import ceil_div

# Tokens whose scores are held in registers at a time. 16, and fewer by several vectors of rows,
# took from 4 percent less (once, with 32 channels) to 30 percent more.
TOKENS = 8
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
        depth = ceil_div(channels, 2) if pairs else channels
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


@dataclass(frozen=True)
class Types:
    """How LLVM writes the types of a function with so many rows a vector."""

    lanes: int
    pairs: bool

    @property
    def word(self) -> str:
        """A channel, or a pair of them."""
        return "i32" if self.pairs else "float"

    @property
    def words(self) -> str:
        return f"<{self.lanes} x {self.word}>"

    @property
    def scores(self) -> str:
        return f"<{self.lanes} x float>"

    @property
    def factors(self) -> str:
        """What the product takes: words, seen as channels."""
        return f"<{2 * self.lanes} x bfloat>" if self.pairs else self.words

    @property
    def lowest(self) -> str:
        """Scores of -inf, without their type."""
        return f"<{', '.join(['float 0xFFF0000000000000'] * self.lanes)}>"

    @property
    def product(self) -> str:
        return "@llvm.x86.avx512bf16.dpbf16ps.512" if self.pairs else f"@llvm.fma.v{self.lanes}f32"

    @property
    def declaration(self) -> str:
        # The addend is first for the product of pairs, last for `fma`, where all types are alike.
        return (
            f"declare {self.scores} {self.product}({self.scores}, {self.factors}, {self.factors})"
        )


def body(depth: int, page: int, types: Types) -> str:
    """LLVM's text of `page_max`.

    Args:
        depth: channels, or pairs of them.
        page: tokens a page.
        types: of the vectors; rows are a multiple of their lanes.
    """
    scores, word = types.scores, types.word
    return f"""
  %first = mul i64 %thread, {types.lanes}
  %step = mul i64 %threads, {types.lanes}
  br label %next.rows
next.rows:
  %row = phi i64 [%first, %entry], [%row.next, %end.rows]
  %rows.more = icmp ult i64 %row, %rows
  br i1 %rows.more, label %next.page, label %done
next.page:
  %at = phi i64 [0, %next.rows], [%at.next, %end.page]
  %key.at = mul i64 %at, {depth * page}
  %key.page = getelementptr {word}, ptr %keys, i64 %key.at
  br label %next.tokens
next.tokens:
  %token = phi i64 [0, %next.page], [%token.next, %next.tokens]
  %best.0 = phi {scores} [{types.lowest}, %next.page], [%best.{TOKENS}, %next.tokens]
  %key = getelementptr {word}, ptr %key.page, i64 %token
{_products(depth, page, types)}
{_maxima(types, f"sum.{depth - 1}")}
  %token.next = add i64 %token, {TOKENS}
  %tokens.more = icmp ult i64 %token.next, {page}
  br i1 %tokens.more, label %next.tokens, label %end.page
end.page:
  %result.line = mul i64 %row, %pages
  %result.page = mul i64 %at, {types.lanes}
  %result.at = add i64 %result.line, %result.page
  %result.place = getelementptr float, ptr %result, i64 %result.at
  store {scores} %best.{TOKENS}, ptr %result.place, align 4
  %at.next = add i64 %at, 1
  %pages.more = icmp ult i64 %at.next, %pages
  br i1 %pages.more, label %next.page, label %end.rows
end.rows:
  %row.next = add i64 %row, %step
  br label %next.rows
"""


def own_body(depth: int, page: int, types: Types) -> str:
    """LLVM's text of `own_page_max`: causal largest scores of rows in their own pages.

    `places` are where in its page each row's query stands, of the `each` rows of a query block;
    `first` is the page of the first query block.
    """
    scores, places = types.scores, f"<{types.lanes} x i32>"
    seen = "\n".join(
        f"""
  %at.{token} = add {places} %token.all, <{", ".join([f"i32 {token}"] * types.lanes)}>
  %seen.{token} = icmp sge {places} %places.mine, %at.{token}
  %causal.{token} = select <{types.lanes} x i1> %seen.{token}, {scores} %sum.{depth - 1}.{token},"""
        f" {scores} {types.lowest}"
        for token in range(TOKENS)
    )
    return f"""
  %start = mul i64 %thread, {types.lanes}
  %step = mul i64 %threads, {types.lanes}
  br label %next.rows
next.rows:
  %row = phi i64 [%start, %entry], [%row.next, %end.rows]
  %rows.more = icmp ult i64 %row, %rows
  br i1 %rows.more, label %begin.rows, label %done
begin.rows:
  %block = udiv i64 %row, %each
  %at = add i64 %first, %block
  %key.at = mul i64 %at, {depth * page}
  %key.page = getelementptr {types.word}, ptr %keys, i64 %key.at
  %within = urem i64 %row, %each
  %places.place = getelementptr i32, ptr %places, i64 %within
  %places.mine = load {places}, ptr %places.place, align 4
  br label %next.tokens
next.tokens:
  %token = phi i64 [0, %begin.rows], [%token.next, %next.tokens]
  %best.0 = phi {scores} [{types.lowest}, %begin.rows], [%best.{TOKENS}, %next.tokens]
  %key = getelementptr {types.word}, ptr %key.page, i64 %token
{_products(depth, page, types)}
  %token.short = trunc i64 %token to i32
  %token.first = insertelement {places} poison, i32 %token.short, i32 0
  %token.all = shufflevector {places} %token.first, {places} poison, {places} zeroinitializer
{seen}
{_maxima(types, "causal")}
  %token.next = add i64 %token, {TOKENS}
  %tokens.more = icmp ult i64 %token.next, {page}
  br i1 %tokens.more, label %next.tokens, label %end.rows
end.rows:
  %result.place = getelementptr float, ptr %result, i64 %row
  store {scores} %best.{TOKENS}, ptr %result.place, align 4
  %row.next = add i64 %row, %step
  br label %next.rows
"""


def _products(depth: int, page: int, types: Types) -> str:
    """Adds up the products of all channels: %sum.C.T with channel C, of token T."""
    word, words, scores, factors = types.word, types.words, types.scores, types.factors
    lines = []
    for at in range(depth):
        lines += [
            f"%line.{at} = mul i64 %rows, {at}",
            f"%query.at.{at} = add i64 %line.{at}, %row",
            f"%query.place.{at} = getelementptr {word}, ptr %query, i64 %query.at.{at}",
            f"%query.words.{at} = load {words}, ptr %query.place.{at}, align 4",
            f"%query.{at} = bitcast {words} %query.words.{at} to {factors}",
        ]
        for token in range(TOKENS):
            name = f"{at}.{token}"
            before = f"{scores} %sum.{at - 1}.{token}" if at else f"{scores} zeroinitializer"
            each = (f"{factors} %query.{at}", f"{factors} %key.{name}")
            order = (before, *each) if types.pairs else (*each, before)
            lines += [
                f"%key.place.{name} = getelementptr {word}, ptr %key, i64 {at * page + token}",
                f"%key.one.{name} = load {word}, ptr %key.place.{name}, align 4",
                f"%key.first.{name} = insertelement {words} poison, {word} %key.one.{name}, i32 0",
                f"%key.words.{name} = shufflevector {words} %key.first.{name}, {words} poison, "
                f"<{types.lanes} x i32> zeroinitializer",
                f"%key.{name} = bitcast {words} %key.words.{name} to {factors}",
                f"%sum.{name} = call {scores} {types.product}({', '.join(order)})",
            ]
    return "\n".join(f"  {line}" for line in lines)


def _maxima(types: Types, values: str) -> str:
    """Takes the largest of %best.0 and all %VALUES.T: %best.T of T tokens."""
    lines, scores = [], types.scores
    for token in range(TOKENS):
        value = f"{scores} %{values}.{token}"
        lines += [
            f"%larger.{token} = fcmp ogt {value}, %best.{token}",
            f"%best.{token + 1} = select <{types.lanes} x i1> %larger.{token}, {value}, "
            f"{scores} %best.{token}",
        ]
    return "\n".join(f"  {line}" for line in lines)
