"""LLVM's text of `tail_values`: what rows keep of what they read, and what unread spans add.

A sequence's means are unpacked, and its vectors of rows take all of them one after the other.
"""

import torch

from dam_vllm.attention.cpu.llvm_text import (
    LOADED,
    every,
    exponential,
    logits,
    loop,
    splat,
    widened,
)
from dam_vllm.attention.cpu.page_max_text import Types
from dam_vllm.attention.cpu.row_text import (
    asked,
    indented,
    largest,
    numbers,
    products,
    sequence,
)

# Channels that are taken at a time; head sizes are multiples of it.
CHANNELS = 8


def room(size: int, types: Types) -> int:
    """Words that a thread needs for each of the most spans that any sequence has."""
    return types.depth(size) + size + types.lanes


def body(size: int, dtype: torch.dtype, types: Types, capped: bool) -> str:
    """LLVM's text of `tail_values`; `longest` are the most spans, in whole groups of lanes.

    Args:
        size: channels.
        dtype: of means.
        types: of the vectors.
        capped: whether scores are.
    """
    return every(
        "%sequences",
        f"""{numbers(types)}
  %room = mul i64 %longest, {room(size, types)}
  %room.mine = mul i64 %thread, %room
  %keys = getelementptr {types.word}, ptr %unpacked, i64 %room.mine
  %values.at = mul i64 %longest, {types.depth(size)}
  %values = getelementptr float, ptr %keys, i64 %values.at
  %weights.at = mul i64 %longest, {size}
  %weights = getelementptr float, ptr %values, i64 %weights.at""",
        f"""{sequence()}
  %filled = add i64 %count, {types.lanes - 1}
  %groups = udiv i64 %filled, {types.lanes}
  %spans = mul i64 %groups, {types.lanes}
  %last = sub i64 %count, 1
{loop("unpacking", "each.begin", "0", "%spans", _unpacked(size, dtype, types), end="line.done")}
{loop("vectors", "unpacking.done", "%from", "%until", _tail(size, types, capped), end="out.done")}
""",
        "vectors.done",
    )


def _unpacked(size: int, dtype: torch.dtype, types: Types) -> str:
    """A span's mean key as words and mean value in float32; the last one's fill a group up."""
    kind, words = LOADED[dtype], types.depth(CHANNELS)
    if types.pairs:
        key = f"  %key.some = load <{words} x i32>, ptr %key.from, align 2"
    else:
        key = widened("key.some", "%key.from", dtype, CHANNELS)
    line = f"""
  %channel = mul i64 %line.at, {CHANNELS}
  %key.from = getelementptr {kind}, ptr %mean, i64 %channel
{key}
  %word = mul i64 %line.at, {words}
  %key.to = getelementptr {types.word}, ptr %key.line, i64 %word
  store <{words} x {types.word}> %key.some, ptr %key.to, align 4
  %value.channel = add i64 %channel, {size}
  %value.from = getelementptr {kind}, ptr %mean, i64 %value.channel
{widened("value.some", "%value.from", dtype, CHANNELS)}
  %value.to = getelementptr float, ptr %value.line, i64 %channel
  store <{CHANNELS} x float> %value.some, ptr %value.to, align 4"""
    return f"""
  %beyond = icmp ugt i64 %unpacking.at, %last
  %span = select i1 %beyond, i64 %last, i64 %unpacking.at
  %id.place = getelementptr i32, ptr %entries, i64 %span
  %id.short = load i32, ptr %id.place, align 4
  %id = sext i32 %id.short to i64
  %mean.at = mul i64 %id, {2 * size}
  %mean = getelementptr {kind}, ptr %means, i64 %mean.at
  %key.line.at = mul i64 %unpacking.at, {types.depth(size)}
  %key.line = getelementptr {types.word}, ptr %keys, i64 %key.line.at
  %value.line.at = mul i64 %unpacking.at, {size}
  %value.line = getelementptr float, ptr %values, i64 %value.line.at
{loop("line", "unpacking.body", "0", str(size // CHANNELS), line)}"""


def _tail(size: int, types: Types, capped: bool) -> str:
    """A vector of rows: logits of spans, their powers, and values added up by shares of them."""
    lanes, vector, depth = types.lanes, types.scores, types.depth(size)
    values = _values(size, types)
    scored = loop(
        "scoring", "vectors.body", "0", "%groups", _logits(depth, types, capped),
        [("top", vector, "%top.before")], "score.done",
    )  # fmt: skip
    weighed = f"""
  %weight.place = getelementptr {vector}, ptr %weights, i64 %weighing.at
  %logit = load {vector}, ptr %weight.place, align 4
  %below = fsub {vector} %logit, %top
{exponential("weight", "%below", lanes)}
  store {vector} %weight, ptr %weight.place, align 4
  %total.next = fadd {vector} %total, %weight"""
    return f"""{asked(depth, types)}
{scored}
  %fall = fsub {vector} %top.before, %top
{exponential("far", "%fall", lanes)}
  %read = fmul {vector} %total.before, %far
{loop("weighing", "scoring.done", "0", "%spans", weighed, [("total", vector, "%read")])}
  %inverse = fdiv {vector} {splat(1.0, lanes)}, %total
  %kept = fmul {vector} %read, %inverse
  %kept.place = getelementptr {vector}, ptr %keep, i64 %vectors.at
  store {vector} %kept, ptr %kept.place, align 4
  %tail.first = mul i64 %vectors.at, {size}
{loop("out", "weighing.done", "0", str(size // CHANNELS), values, end="value.done")}"""


def _logits(depth: int, types: Types, capped: bool) -> str:
    """Logits of as many spans as lanes, written to %weights; %top.next."""
    lanes, vector = types.lanes, types.scores
    lines = []
    for at in range(lanes):
        lines += [
            logits(f"span.{at}", f"%score.sum.{at}", lanes, capped),
            f"%many.{at} = fadd {vector} %span.{at}.logit, %bias",
            f"%span.at.{at} = add i64 %group, {at}",
            f"%there.{at} = icmp ult i64 %span.at.{at}, %count",
            f"%logit.{at} = select i1 %there.{at}, {vector} %many.{at}, {vector} {types.lowest}",
            f"%logit.place.{at} = getelementptr {vector}, ptr %weights, i64 %span.at.{at}",
            f"store {vector} %logit.{at}, ptr %logit.place.{at}, align 4",
        ]
    lines += largest("top.next", [*(f"%logit.{at}" for at in range(lanes)), "%top"], types)
    depths, strides = str(depth), (depth, 1)
    return f"""
  %group = mul i64 %scoring.at, {lanes}
  %key.at = mul i64 %group, {depth}
  %key = getelementptr {types.word}, ptr %keys, i64 %key.at
{products("score", "scoring.body", depths, "%asked", "%key", strides, lanes, types)}
{indented(lines)}"""


def _values(size: int, types: Types) -> str:
    """Some channels: values, added up by weights, over the sum of all powers."""
    vector, lines = types.scores, ["%tail.line = add i64 %tail.first, %value.channels"]
    for at in range(CHANNELS):
        lines += [
            f"%share.{at} = fmul {vector} %value.sum.{at}, %inverse",
            f"%tail.at.{at} = add i64 %tail.line, {at}",
            f"%tail.place.{at} = getelementptr {vector}, ptr %tail, i64 %tail.at.{at}",
            f"store {vector} %share.{at}, ptr %tail.place.{at}, align 4",
        ]
    plain, strides = Types(types.lanes, False), (1, size)
    return f"""
  %value.channels = mul i64 %out.at, {CHANNELS}
  %value = getelementptr float, ptr %values, i64 %value.channels
{products("value", "out.body", "%spans", "%weights", "%value", strides, CHANNELS, plain)}
{indented(lines)}"""
