"""LLVM's text of `read_mass`: of the logits of all that a row reads, a log-sum-exp in two parts.

A sequence's pages are unpacked one after the other, and all its vectors of rows go over each.
"""

import torch

from dam_vllm.attention.cpu.llvm_text import (
    LOADED,
    every,
    exponential,
    logits,
    loop,
    whole,
    widened,
)
from dam_vllm.attention.cpu.page_max_text import Types
from dam_vllm.attention.cpu.row_text import (
    added,
    asked,
    indented,
    largest,
    numbers,
    products,
    sequence,
)


def body(size: int, page: int, dtype: torch.dtype, types: Types, capped: bool) -> str:
    """LLVM's text of `read_mass`.

    Args:
        size: channels.
        page: tokens a page.
        dtype: of keys in the cache.
        types: of the vectors.
        capped: whether scores are.
    """
    depth = types.depth(size)
    unpacked, seen = _unpacked(page, dtype, types), _seen(depth, page, types, capped)
    read = f"""
  %id.place = getelementptr i32, ptr %entries, i64 %reading.at
  %id.short = load i32, ptr %id.place, align 4
  %id = sext i32 %id.short to i64
  %page.at = mul i64 %id, %stride
  %page.keys = getelementptr {LOADED[dtype]}, ptr %cache, i64 %page.at
  %page.first = mul i64 %reading.at, {page}
{loop("unpacking", "reading.body", "0", str(depth), unpacked, end="line.done")}
{loop("vectors", "unpacking.done", "%from", "%until", seen, end="on")}"""
    return every(
        "%sequences",
        f"""{numbers(types)}
  %room = mul i64 %thread, {depth * page}
  %words = getelementptr {types.word}, ptr %unpacked, i64 %room""",
        f"""{sequence()}
{loop("reading", "each.begin", "0", "%count", read, end="vectors.done")}""",
        "reading.done",
    )


def _unpacked(page: int, dtype: torch.dtype, types: Types) -> str:
    """A channel of a page, or a pair of channels, as %words, token by token."""
    lanes, ints = types.lanes, f"<{types.lanes} x i32>"
    channels = 2 if types.pairs else 1
    keys = "\n".join(
        f"""
  %key.line.{at} = add i64 %key.at, {at * page}
  %key.place.{at} = getelementptr {LOADED[dtype]}, ptr %page.keys, i64 %key.line.{at}
{widened(f"key.{at}", f"%key.place.{at}", dtype, lanes)}"""
        for at in range(channels)
    )
    # Keys that are taken in pairs, of bfloat16 or fp8, leave the lower half of float32 empty.
    pair = f"""
  %low.bits = bitcast {types.scores} %key.0 to {ints}
  %low = lshr {ints} %low.bits, {whole(16, lanes)}
  %high = bitcast {types.scores} %key.{channels - 1} to {ints}
  %pair = or {ints} %low, %high"""
    line = f"""
  %key.token = mul i64 %line.at, {lanes}
  %key.channel = mul i64 %unpacking.at, {channels * page}
  %key.at = add i64 %key.channel, %key.token
{keys}
{pair if types.pairs else ""}
  %word.line = mul i64 %unpacking.at, {page}
  %word.at = add i64 %word.line, %key.token
  %word.place = getelementptr {types.word}, ptr %words, i64 %word.at
  store {types.words} {"%pair" if types.pairs else "%key.0"}, ptr %word.place, align 4"""
    return loop("line", "unpacking.body", "0", str(page // lanes), line)


def _seen(depth: int, page: int, types: Types, capped: bool) -> str:
    """A vector of rows goes over the page in %words, but for one after all of them."""
    lanes, vector, ints = types.lanes, types.scores, f"<{types.lanes} x i32>"
    carried = [("top", vector, "%top.before"), ("total", vector, "%total.before")]
    groups = loop(
        "groups", "see", "0", str(page // lanes), _group(depth, page, types, capped), carried,
        "score.done",
    )  # fmt: skip
    return f"""
  %positions.place = getelementptr {ints}, ptr %positions, i64 %vectors.at
  %position = load {ints}, ptr %positions.place, align 4
  %position.last = extractelement {ints} %position, i32 {lanes - 1}
  %last = zext i32 %position.last to i64
  %later = icmp ugt i64 %page.first, %last
  br i1 %later, label %on, label %see
see:{asked(depth, types)}
{groups}
  store {vector} %top, ptr %top.place, align 4
  store {vector} %total, ptr %total.place, align 4
  br label %on
on:"""


def _group(depth: int, page: int, types: Types, capped: bool) -> str:
    """As many tokens as lanes: %top.next and %total.next."""
    lanes, vector, ints = types.lanes, types.scores, f"<{types.lanes} x i32>"
    lines = [
        "%token.at = add i64 %page.first, %group",
        "%token.short = trunc i64 %token.at to i32",
        f"%token.one = insertelement {ints} poison, i32 %token.short, i32 0",
        f"%token.all = shufflevector {ints} %token.one, {ints} poison, {ints} zeroinitializer",
    ]
    for at in range(lanes):
        lines += [
            logits(f"token.{at}", f"%score.sum.{at}", lanes, capped),
            f"%token.{at} = add {ints} %token.all, {whole(at, lanes)}",
            f"%seen.{at} = icmp sge {ints} %position, %token.{at}",
            f"%causal.{at} = select <{lanes} x i1> %seen.{at}, {vector} %token.{at}.logit, "
            f"{vector} {types.lowest}",
        ]
    lines += [
        *largest("top.next", [*(f"%causal.{at}" for at in range(lanes)), "%top"], types),
        f"%fall = fsub {vector} %top, %top.next",
        exponential("kept", "%fall", lanes),
        f"%total.kept = fmul {vector} %total, %kept",
    ]
    for at in range(lanes):
        lines += [
            f"%below.{at} = fsub {vector} %causal.{at}, %top.next",
            exponential(f"power.{at}", f"%below.{at}", lanes),
        ]
    lines += added("total.next", [*(f"%power.{at}" for at in range(lanes)), "%total.kept"], types)
    depths, strides = str(depth), (1, page)
    return f"""
  %group = mul i64 %groups.at, {lanes}
  %keys = getelementptr {types.word}, ptr %words, i64 %group
{products("score", "groups.body", depths, "%asked", "%keys", strides, lanes, types)}
{indented(lines)}"""
