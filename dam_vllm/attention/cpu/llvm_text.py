"""Pieces of LLVM's text that compiled functions share."""

import struct
from collections.abc import Sequence

import numpy as np
import torch

# How LLVM loads numbers of a dtype; of bfloat16, which are the upper halves of float32, the bits.
LOADED = {
    torch.float32: "float",
    torch.float16: "half",
    torch.bfloat16: "i16",
    torch.float8_e4m3fn: "i8",
    torch.float8_e5m2: "i8",
}

# Cephes' expf: powers of two, and a polynomial on what is left.
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip
# Below, powers are no longer normal.
LEAST = -87.0


def number(value: float) -> str:
    """A float32 constant, as LLVM writes it: in 64 bits."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', float(np.float32(value))))[0]:016X}"


def splat(value: float, lanes: int) -> str:
    """A constant vector, without its type."""
    return f"<{', '.join([f'float {number(value)}'] * lanes)}>"


def whole(value: int, lanes: int, bits: int = 32) -> str:
    """A constant vector of whole numbers, without its type."""
    return f"<{', '.join([f'i{bits} {value}'] * lanes)}>"


def loop(
    name: str,
    entry: str,
    start: str,
    stop: str,
    body: str,
    carried: Sequence[tuple[str, str, str]] = (),
    end: str | None = None,
) -> str:
    """A loop that counts %NAME.at from `start` to before `stop`; goes on in the block NAME.done.

    Args:
        name: of its blocks.
        entry: the block before.
        start: i64.
        stop: i64.
        body: of a turn.
        carried: name, type and first value of what passes from one turn to the next, where the
            body sets %NAME.next of it.
        end: the block in which the body ends, where it is not the one in which it begins.
    """
    end = end or f"{name}.body"
    phis = "\n".join(
        f"  %{each} = phi {kind} [{first}, %{entry}], [%{each}.next, %{end}]"
        for each, kind, first in carried
    )
    return f"""
  br label %{name}.head
{name}.head:
  %{name}.at = phi i64 [{start}, %{entry}], [%{name}.next, %{end}]
{phis}
  %{name}.more = icmp ult i64 %{name}.at, {stop}
  br i1 %{name}.more, label %{name}.body, label %{name}.done
{name}.body:
{body}
  %{name}.next = add i64 %{name}.at, 1
  br label %{name}.head
{name}.done:"""


def exponential(name: str, power: str, lanes: int) -> str:
    """Exp of a vector of at most 88: %NAME, within two units in the last place.

    Needs `llvm.fma`, `llvm.rint` and `llvm.maxnum` of such vectors; of less than LEAST it is
    exp(LEAST).
    """
    vector, ints = f"<{lanes} x float>", f"<{lanes} x i32>"
    fma, kind = f"call {vector} @llvm.fma.v{lanes}f32", f"{vector} "
    bias, shift = (whole(value, lanes) for value in (127, 23))

    def constant(value: float) -> str:
        return kind + splat(value, lanes)

    lines = [
        f"%{name}.low = call {vector} @llvm.maxnum.v{lanes}f32({kind}{power}, {constant(LEAST)})",
        f"%{name}.twos = fmul {vector} %{name}.low, {splat(LOG2_E, lanes)}",
        f"%{name}.n = call {vector} @llvm.rint.v{lanes}f32({kind}%{name}.twos)",
        f"%{name}.r0 = {fma}({kind}%{name}.n, {constant(-LN2_HIGH)}, {kind}%{name}.low)",
        f"%{name}.r = {fma}({kind}%{name}.n, {constant(-LN2_LOW)}, {kind}%{name}.r0)",
    ]
    before = splat(POLYNOMIAL[0], lanes)
    for at, factor in enumerate(POLYNOMIAL[1:]):
        lines.append(f"%{name}.p{at} = {fma}({kind}{before}, {kind}%{name}.r, {constant(factor)})")
        before = f"%{name}.p{at}"
    lines += [
        f"%{name}.square = fmul {vector} %{name}.r, %{name}.r",
        f"%{name}.curve = {fma}({kind}{before}, {kind}%{name}.square, {kind}%{name}.r)",
        f"%{name}.near = fadd {vector} %{name}.curve, {splat(1.0, lanes)}",
        f"%{name}.int = fptosi {vector} %{name}.n to {ints}",
        f"%{name}.biased = add {ints} %{name}.int, {bias}",
        f"%{name}.bits = shl {ints} %{name}.biased, {shift}",
        f"%{name}.power = bitcast {ints} %{name}.bits to {vector}",
        f"%{name} = fmul {vector} %{name}.near, %{name}.power",
    ]
    return "\n".join(f"  {line}" for line in lines)


def every(count: str, before: str, body: str, end: str) -> str:
    """All that a thread does of `count` things, which threads take in turn.

    Args:
        count: i64.
        before: what comes first, in the block `entry`.
        body: begins in the block `each.begin` with %each.at.
        end: the block in which it ends.
    """
    return f"""{before}
  br label %each.head
each.head:
  %each.at = phi i64 [%thread, %entry], [%each.next, %{end}]
  %each.more = icmp ult i64 %each.at, {count}
  br i1 %each.more, label %each.begin, label %done
each.begin:
{body}
  %each.next = add i64 %each.at, %threads
  br label %each.head
"""


def spread(name: str, lanes: int) -> str:
    """A vector %NAME of %NAME.one."""
    vector, zeros = f"<{lanes} x float>", f"<{lanes} x i32> zeroinitializer"
    return f"""
  %{name}.first = insertelement {vector} poison, float %{name}.one, i32 0
  %{name} = shufflevector {vector} %{name}.first, {vector} poison, {zeros}"""


def logits(name: str, score: str, lanes: int, capped: bool) -> str:
    """Scores times %scale, capped by tanh at %cap: %NAME.logit of a vector."""
    vector = f"<{lanes} x float>"
    if not capped:
        return f"  %{name}.logit = fmul {vector} {score}, %scale"
    # tanh(x) = (exp(2x) - 1) / (exp(2x) + 1), which is 1 in float32 from 10 on.
    one, most, least = (splat(value, lanes) for value in (1.0, 20.0, -20.0))
    return f"""
  %{name}.scaled = fmul {vector} {score}, %scale
  %{name}.ratio = fdiv {vector} %{name}.scaled, %cap
  %{name}.twice = fadd {vector} %{name}.ratio, %{name}.ratio
  %{name}.low = call {vector} @llvm.maxnum.v{lanes}f32({vector} %{name}.twice, {vector} {least})
  %{name}.x = call {vector} @llvm.minnum.v{lanes}f32({vector} %{name}.low, {vector} {most})
{exponential(f"{name}.power", f"%{name}.x", lanes)}
  %{name}.over = fsub {vector} %{name}.power, {one}
  %{name}.under = fadd {vector} %{name}.power, {one}
  %{name}.tanh = fdiv {vector} %{name}.over, %{name}.under
  %{name}.logit = fmul {vector} %{name}.tanh, %cap"""


def widened(name: str, place: str, dtype: torch.dtype, lanes: int) -> str:
    """Float32 %NAME of a vector of numbers that lie at a place, of a dtype of LOADED."""
    kinds = (LOADED[dtype], "float", "half", "i32", "i16")
    loaded, vector, half, ints, short = (f"<{lanes} x {kind}>" for kind in kinds)

    made = {
        torch.float32: [f"%{name} = bitcast {vector} %{name}.held to {vector}"],
        torch.float16: [f"%{name} = fpext {half} %{name}.held to {vector}"],
        torch.bfloat16: [
            f"%{name}.wide = zext {short} %{name}.held to {ints}",
            f"%{name}.bits = shl {ints} %{name}.wide, {whole(16, lanes)}",
            f"%{name} = bitcast {ints} %{name}.bits to {vector}",
        ],
        # The upper half of float16.
        torch.float8_e5m2: [
            f"%{name}.wide = zext {loaded} %{name}.held to {short}",
            f"%{name}.bits = shl {short} %{name}.wide, {whole(8, lanes, 16)}",
            f"%{name}.half = bitcast {short} %{name}.bits to {half}",
            f"%{name} = fpext {half} %{name}.half to {vector}",
        ],
        # A bit of mantissa more than e5m2, one of exponent less, whose bias is less by 8.
        torch.float8_e4m3fn: [
            f"%{name}.wide = sext {loaded} %{name}.held to {short}",
            f"%{name}.sign = and {short} %{name}.wide, {whole(-(1 << 15), lanes, 16)}",
            f"%{name}.low = and {short} %{name}.wide, {whole(127, lanes, 16)}",
            f"%{name}.rest = shl {short} %{name}.low, {whole(7, lanes, 16)}",
            f"%{name}.bits = or {short} %{name}.sign, %{name}.rest",
            f"%{name}.half = bitcast {short} %{name}.bits to {half}",
            f"%{name}.less = fpext {half} %{name}.half to {vector}",
            f"%{name} = fmul {vector} %{name}.less, {splat(256.0, lanes)}",
        ],
    }[dtype]
    held = f"%{name}.held = load {loaded}, ptr {place}, align {dtype.itemsize}"
    return "\n".join(f"  {line}" for line in (held, *made))
