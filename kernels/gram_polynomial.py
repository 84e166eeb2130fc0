"""Polynomials of small Gram matrices in one launch: one program per matrix, all of it on chip.

Whatever the long side was, iterations on a short side up to SIDE then take three launches: X X^T,
this, and Q X. Q, R, Z and W of 128 x 128 do not fit: compiled for sm_90 they spill (168 to 1612
instructions with 8 and 16 warps; in blocks of 64 x 64, 227; ptxas of Triton 3.9, 2026-11).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import tables, tiles
from .configs import FUSION
from .small_newton_schulz import HALF, block

SIDE = 64


@triton.jit
def symmetric_sum(x, y, z, alpha, beta, lower):
    """beta x + alpha y z rounded to their type, its lower triangle on both sides."""
    value = (beta * x.to(tl.float32) + alpha * tl.dot(y, z)).to(x.dtype)
    return tl.where(lower, value, tl.trans(value))


@triton.jit(do_not_specialize=["n", "iterations"])
def polynomial_kernel(
    R, out, coefficients, n, iterations, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """Z = b R + c R^2;  Q <- a Q + Q Z;  W = a R + R Z;  R <- a W + W Z."""
    first = tl.program_id(0).to(tl.int64) * n * n
    i = tl.arange(0, BLOCK)
    at = tiles.square(i, i, n, 1)
    mask = (i < n)[:, None] & (i < n)[None, :]
    lower = i[:, None] >= i[None, :]
    r = tl.load(R + first + at, mask=mask, other=0.0)
    q = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(TYPE)
    for t in tl.range(0, iterations):
        a = tiles.number(coefficients, 3 * t).to(tl.float32)
        b = tiles.number(coefficients, 3 * t + 1).to(tl.float32)
        if SQUARE:
            c = tiles.number(coefficients, 3 * t + 2).to(tl.float32)
            z = symmetric_sum(r, r, r, c, b, lower)
            b = 1.0
        else:
            z = r
        q = symmetric_sum(q, q, z, b, a, lower)
        w = symmetric_sum(r, r, z, b, a, lower)
        r = symmetric_sum(w, w, z, b, a, lower)
    tl.store(out + first + at, q, mask=mask)


def gram_polynomial(R: Tensor, coefficients: list[float]) -> Tensor:
    n = R.shape[-1]
    if R.dtype not in HALF or not 0 < n <= SIDE:
        return ops.gram_polynomial.definition(R, coefficients)
    R, out = R.contiguous(), torch.empty_like(R, memory_format=torch.contiguous_format)
    count = R.numel() // (n * n)
    if count:
        numbers = tables.upload(tuple(map(tables.bits, coefficients)), R.device)
        polynomial_kernel[(count,)](
            R, out, numbers, n, len(coefficients) // 3, tables.TYPES[R.dtype], block(n),
            any(coefficients[2::3]), num_warps=warps(block(n)), num_stages=1, **FUSION,
        )  # fmt: skip
    return out


def warps(side: int) -> int:
    """Warps of one program: those that leave its matrices in registers."""
    return max(1, side**2 // 512)
