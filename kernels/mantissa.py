"""A float32 number in two halves, as `orthonorm/ops/mantissa.py` defines them."""

import triton
import triton.language as tl


@triton.jit
def joined(weight, mantissa):
    """Return the float32 number of a bfloat16 weight and its int16 mantissa."""
    high = weight.to(tl.float32).to(tl.uint32, bitcast=True)
    low = mantissa.to(tl.int32)
    none = (low < 0) & (high << 1 == 0)  # weight overwritten by 0: nothing is below
    return (high + tl.where(none, 0, low).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def split(number):
    """Return the bfloat16 nearest to a float32 number, ties away from zero, and the mantissa."""
    bits = number.to(tl.uint32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # all NaN become one
    high = (bits + 0x8000) & 0xFFFF0000
    low = (bits - high).to(tl.int32, bitcast=True).to(tl.int16)
    return high.to(tl.float32, bitcast=True).to(tl.bfloat16), low
