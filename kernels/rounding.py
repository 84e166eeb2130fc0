"""bfloat16 weights, rounded stochastically or with a mantissa beside them.

Defined by `orthonorm/ops/rounding.py` and `orthonorm/ops/mantissa.py`.
"""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def hashed(x):
    """Return a permutation of 32-bit numbers that looks random (lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def low(x):
    """Return the low 32 bits of an int64."""
    return (x & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def rounded(x, at, base, seed, TYPE: tl.constexpr):
    """Return x; with a seed and TYPE bfloat16, return it rounded stochastically to bfloat16.

    `at` are the addresses that x goes to, and `base` is that of the tensor's first element. Their
    distance picks the random bits.
    """
    if seed is None or tl.bfloat16 != TYPE:
        result = x
    else:
        number = tl.load(seed)
        key = hashed(hashed(low(number) ^ GOLDEN) ^ low(number >> 32))
        place = (at.to(tl.int64) - base) >> 1
        random = hashed(key ^ low(place) ^ low(place >> 32) * GOLDEN) & 0xFFFF
        near = x.to(tl.float32)
        cut = (near.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
        result = tl.where(near != near, near, cut.to(tl.float32, bitcast=True))
    return result


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
