"""Stochastic rounding of bfloat16 weights, as `orthonorm/ops/rounding.py` defines it."""

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
