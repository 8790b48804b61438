"""Conversion to float8_e4m3fn inside Triton kernels."""

import triton
import triton.language as tl

# The largest number of float8_e4m3fn.
FP8_MAX = tl.constexpr(448.0)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_fp8(numbers):
    """The nearest float8_e4m3fn of float32 numbers; what is too large becomes the largest one."""
    numbers = tl.minimum(tl.maximum(numbers, -FP8_MAX), FP8_MAX)
    if INTERPRETED:
        # The interpreter loses the carry of a mantissa that is rounded up, and so half the number.
        bits = numbers.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (numbers + 24576.0) - 24576.0  # multiples of the smallest number, 2 ** -9
        rounded = bits.to(tl.float32, bitcast=True)
        numbers = tl.where(tl.abs(numbers) < 0.015625, small, rounded)
    return numbers.to(tl.float8e4nv)
