"""Pieces of LLVM's text that compiled functions share."""

import struct
from collections.abc import Sequence

import numpy as np

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
    vector, whole = f"<{lanes} x float>", f"<{lanes} x i32>"
    fma, kind = f"call {vector} @llvm.fma.v{lanes}f32", f"{vector} "
    bias, shift = (f"<{', '.join([f'i32 {value}'] * lanes)}>" for value in (127, 23))

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
        f"%{name}.int = fptosi {vector} %{name}.n to {whole}",
        f"%{name}.biased = add {whole} %{name}.int, {bias}",
        f"%{name}.bits = shl {whole} %{name}.biased, {shift}",
        f"%{name}.power = bitcast {whole} %{name}.bits to {vector}",
        f"%{name} = fmul {vector} %{name}.near, %{name}.power",
    ]
    return "\n".join(f"  {line}" for line in lines)
