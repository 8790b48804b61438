"""Shares of attention mass in pages, compiled: a vector of rows at a time, page after page.

Lanes are rows, so that a row's result depends on nothing else. For a span of 1024 rows and 512
pages on a core of an EPYC of the fourth generation (AVX-512) they take .17 ms, torch's mask,
softmax and maximum .93; a choice by top-p then .11, where torch adds pages up in .84.
"""

import functools
from dataclasses import dataclass

import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.llvm_text import every, exponential, logits, loop, splat, spread
from dam_vllm.attention.cpu.span import Span
from dam_vllm.masks.budget import PageMasses

MASS_ARGUMENTS = {
    "scores": "ptr", "own": "ptr", "present": "ptr", "index": "ptr", "numbers": "ptr",
    "largest": "ptr", "pages": "i64", "vectors": "i64", "each": "i64",
}  # fmt: skip
UNTIL_ARGUMENTS = {
    "mass": "ptr", "order": "ptr", "present": "ptr", "enough": "ptr", "counts": "ptr",
    "pages": "i64", "vectors": "i64", "limit": "i64", "each": "i64",
}  # fmt: skip


def compiled_masses(
    scores: torch.Tensor, own: torch.Tensor, span: Span, scale: float, softcap: float
) -> "CompiledMasses":
    """Masses of a span's rows.

    Args:
        scores: float32 [vectors, pages, lanes], of `CompiledScores.max_scores`; given up.
        own: float32 [vectors * lanes], each row's largest causal score in its own page.
        span: whose rows they are.
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.
    """
    vectors, pages, lanes = scores.shape
    count, rows = span.present.shape
    present = span.present.float()
    numbers = torch.tensor([scale, softcap])
    largest = torch.empty(vectors, pages)
    given = (scores, own, present, span.index, numbers, largest)
    _mass(llvm.lanes(), softcap != 0.0).call(
        *(each.data_ptr() for each in given), pages, vectors, rows // lanes
    )
    best = largest.view(count, -1, pages).amax(1)
    return CompiledMasses(scores, best, span.static, span.index, present)


@dataclass(frozen=True)
class CompiledMasses(PageMasses):
    """Masses of query blocks whose rows are whole vectors.

    Attributes:
        mass: float32 [vectors, pages, lanes].
        present: float32 [query blocks, rows], 1 for rows that are there, else 0.
    """

    present: torch.Tensor

    def take(self, some: slice) -> "CompiledMasses":
        each = self.present.shape[1] // self.mass.shape[2]
        rows = slice(some.start * each, some.stop * each)
        return CompiledMasses(
            self.mass[rows], self.largest[some], self.static[some], self.own[some],
            self.present[some],
        )  # fmt: skip

    def until(self, order: torch.Tensor, enough: torch.Tensor) -> torch.Tensor:
        vectors, pages, lanes = self.mass.shape
        counts = torch.empty(vectors, dtype=torch.int64)
        order, limit = order.contiguous(), order.shape[1]
        given = (self.mass, order, self.present, enough.contiguous(), counts)
        each = self.present.shape[1] // lanes
        _until(lanes).call(*(one.data_ptr() for one in given), pages, vectors, limit, each)
        return counts.view(len(order), -1).amax(1)


@functools.cache
def _mass(lanes: int, capped: bool) -> llvm.Compiled:
    vector = f"<{lanes} x float>"
    declarations = f"""
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})
declare {vector} @llvm.rint.v{lanes}f32({vector})
declare {vector} @llvm.maxnum.v{lanes}f32({vector}, {vector})
declare {vector} @llvm.minnum.v{lanes}f32({vector}, {vector})
declare i32 @llvm.vector.reduce.smax.v{lanes}i32(<{lanes} x i32>)
"""
    return llvm.compiled("page_mass", MASS_ARGUMENTS, declarations, _mass_body(lanes, capped))


def _mass_body(lanes: int, capped: bool) -> str:
    """LLVM's text of `page_mass`: scores become masses, in place."""
    vector = f"<{lanes} x float>"
    place = f"getelementptr {vector}, ptr %mine, i64"
    largest = f"@llvm.maxnum.v{lanes}f32"
    scaled = f"""
  %score.place = {place} %scaling.at
  %score = load {vector}, ptr %score.place, align 4
{logits("far", "%score", lanes, capped)}
  store {vector} %far.logit, ptr %score.place, align 4
  %top.next = call {vector} {largest}({vector} %top, {vector} %far.logit)"""
    weighed = f"""
  %logit.place = {place} %weighing.at
  %logit = load {vector}, ptr %logit.place, align 4
  %below = fsub {vector} %logit, %most
{exponential("weight", "%below", lanes)}
  store {vector} %weight, ptr %logit.place, align 4
  %sum.next = fadd {vector} %sum, %weight"""
    shared = f"""
  %weight.place = {place} %sharing.at
  %held = load {vector}, ptr %weight.place, align 4
  %part = fmul {vector} %held, %inverse
  %share = select <{lanes} x i1> %there, {vector} %part, {vector} zeroinitializer
  store {vector} %share, ptr %weight.place, align 4
  %bits = bitcast {vector} %share to <{lanes} x i32>
  %best.bits = call i32 @llvm.vector.reduce.smax.v{lanes}i32(<{lanes} x i32> %bits)
  %best = bitcast i32 %best.bits to float
  %best.place = getelementptr float, ptr %mine.largest, i64 %sharing.at
  store float %best, ptr %best.place, align 4"""
    hidden = f"""
  %hidden.place = {place} %hiding.at
  store {vector} zeroinitializer, ptr %hidden.place, align 4
  %none.place = getelementptr float, ptr %mine.largest, i64 %hiding.at
  store float zeroinitializer, ptr %none.place, align 4"""
    lowest = splat(float("-inf"), lanes)
    body = f"""
  %block = udiv i64 %each.at, %each
  %index.place = getelementptr i64, ptr %index, i64 %block
  %last = load i64, ptr %index.place, align 8
  %causal = add i64 %last, 1
  %line = mul i64 %each.at, %pages
  %mine = getelementptr {vector}, ptr %scores, i64 %line
  %mine.largest = getelementptr float, ptr %largest, i64 %line
{loop("scaling", "each.begin", "0", "%last", scaled, [("top", vector, lowest)])}
  %own.place = getelementptr {vector}, ptr %own, i64 %each.at
  %own.score = load {vector}, ptr %own.place, align 4
{logits("near", "%own.score", lanes, capped)}
  %last.place = {place} %last
  store {vector} %near.logit, ptr %last.place, align 4
  %most = call {vector} {largest}({vector} %top, {vector} %near.logit)
{loop("weighing", "scaling.done", "0", "%causal", weighed, [("sum", vector, "zeroinitializer")])}
  %inverse = fdiv {vector} {splat(1.0, lanes)}, %sum
  %there.place = getelementptr {vector}, ptr %present, i64 %each.at
  %there.number = load {vector}, ptr %there.place, align 4
  %there = fcmp ogt {vector} %there.number, zeroinitializer
{loop("sharing", "weighing.done", "0", "%causal", shared)}
{loop("hiding", "sharing.done", "%causal", "%pages", hidden)}
"""
    return every(
        "%vectors",
        f"""
  %scale.one = load float, ptr %numbers, align 4
  %cap.place = getelementptr float, ptr %numbers, i64 1
  %cap.one = load float, ptr %cap.place, align 4
{spread("scale", lanes)}
{spread("cap", lanes)}""",
        body,
        "hiding.done",
    )


@functools.cache
def _until(lanes: int) -> llvm.Compiled:
    return llvm.compiled("page_until", UNTIL_ARGUMENTS, "", _until_body(lanes))


def _until_body(lanes: int) -> str:
    """LLVM's text of `page_until`: pages in order until all rows of a vector have enough."""
    vector, far = f"<{lanes} x float>", splat(float("inf"), lanes)
    return every(
        "%vectors",
        "",
        f"""
  %block = udiv i64 %each.at, %each
  %enough.place = getelementptr float, ptr %enough, i64 %block
  %enough.one = load float, ptr %enough.place, align 4
{spread("wanted", lanes).replace("%wanted.one", "%enough.one")}
  %line = mul i64 %each.at, %pages
  %mine = getelementptr {vector}, ptr %mass, i64 %line
  %order.line = mul i64 %block, %limit
  %ordered = getelementptr i64, ptr %order, i64 %order.line
  %there.place = getelementptr {vector}, ptr %present, i64 %each.at
  %there.number = load {vector}, ptr %there.place, align 4
  %there = fcmp ogt {vector} %there.number, zeroinitializer
  %none = select <{lanes} x i1> %there, {vector} zeroinitializer, {vector} {far}
  br label %adding.head
adding.head:
  %adding.at = phi i64 [0, %each.begin], [%adding.next, %adding.body]
  %sum = phi {vector} [%none, %each.begin], [%sum.next, %adding.body]
  %short = fcmp olt {vector} %sum, %wanted
  %short.bits = bitcast <{lanes} x i1> %short to i{lanes}
  %any = icmp ne i{lanes} %short.bits, 0
  %left = icmp ult i64 %adding.at, %limit
  %more = and i1 %any, %left
  br i1 %more, label %adding.body, label %adding.done
adding.body:
  %page.place = getelementptr i64, ptr %ordered, i64 %adding.at
  %page = load i64, ptr %page.place, align 8
  %mass.place = getelementptr {vector}, ptr %mine, i64 %page
  %held = load {vector}, ptr %mass.place, align 4
  %sum.next = fadd {vector} %sum, %held
  %adding.next = add i64 %adding.at, 1
  br label %adding.head
adding.done:
  %count.place = getelementptr i64, ptr %counts, i64 %each.at
  store i64 %adding.at, ptr %count.place, align 8
""",
        "adding.done",
    )
