"""Whole iterations of small matrices in one launch: one program per matrix, all of it on chip."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import tables, tiles
from .configs import FUSION

HEAD = tl.constexpr(4)  # fields: first program, short side, long side, first matrix; X, out
NUMBERS = tl.constexpr(2)  # eps, safety; the coefficients stand behind the entries
HALF = (torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["count", "iterations"])
def iterate_kernel(
    table, count, iterations, norms, STEPS: tl.constexpr, X_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """X / (safety max(|X|_F, eps)), then X <- a X + (b A + c A^2) X with A = X X^T; X is wide."""
    entries = table + NUMBERS
    program = tl.program_id(0).to(tl.int64)
    entry = tiles.locate(entries, count, program, STEPS)
    batch = program - tiles.field(entries, count, entry, 0)
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    columns = tl.arange(0, BLOCK_M).to(tl.int64)
    inside = (rows < tiles.field(entries, count, entry, 1))[:, None]
    mask = inside & (columns < tiles.field(entries, count, entry, 2))[None, :]
    x, down, across = tiles.matrix(entries, count, entry, batch, HEAD, X_TYPE, 2, False)
    x = tl.load(x + tiles.square(rows, columns, down, across), mask=mask, other=0.0)
    x = x.to(tl.float64)
    divisor = tiles.number(table, 1)
    if SCALE:
        if norms is None:
            norm = tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0))
        else:
            norm = tl.load(norms + tiles.field(entries, count, entry, 3) + batch)
        eps = tiles.number(table, 0)
        divisor = divisor * tl.where(norm < eps, eps, norm)  # NaN stays
    inverse = tl.where(divisor == 0, 0.0, 1.0 / divisor)
    y = (x * inverse).to(tl.float32)
    coefficients = entries + (HEAD + 8) * count
    for t in tl.range(0, iterations):
        a = tiles.number(coefficients, 3 * t).to(tl.float32)
        b = tiles.number(coefficients, 3 * t + 1).to(tl.float32)
        c = tiles.number(coefficients, 3 * t + 2).to(tl.float32)
        left = y.to(DOT_TYPE)
        A = tl.dot(left, tl.trans(left), input_precision="ieee")
        B = b * A
        if c != 0:
            A = A.to(DOT_TYPE)
            B += c * tl.dot(A, A, input_precision="ieee")
        y = a * y + tl.dot(B.to(DOT_TYPE), left, input_precision="ieee")
    out, down, across = tiles.matrix(entries, count, entry, batch, HEAD + 4, X_TYPE, 2, False)
    tl.store(out + tiles.square(rows, columns, down, across), y.to(X_TYPE), mask=mask)


def block(side: int) -> int:
    return max(16, triton.next_power_of_2(side))


def rows(X: list[Tensor], out: list[Tensor]) -> Iterator[tuple[object, tables.Entry]]:
    """What each launch has in common, and the entries: wide, whatever the tensor is."""
    first = 0
    for pair in zip(X, out, strict=True):
        for x, y in tables.views(*pair):
            if x.rows > x.columns:
                x, y = x.mT, y.mT
            if x.batch:
                entry = (x.batch, x.rows, x.columns, first, *x.fields, *y.fields)
                yield (x.dtype, block(x.rows), block(x.columns)), entry
            first += x.batch


def warps(short: int, long: int) -> int:
    """Warps of one program: those that leave its accumulators in registers."""
    return max(1, min(8, short * long // 1024))


def small_newton_schulz(
    X: list[Tensor],
    coefficients: list[float],
    dtype: torch.dtype,
    scale: bool = True,
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> list[Tensor]:
    if not X or dtype not in HALF or any(x.dtype == torch.float64 for x in X):
        arguments = (X, coefficients, dtype, scale, eps, safety, norms)
        return ops.small_newton_schulz.definition(*arguments)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in X]
    norms = None if norms is None else norms.to(torch.float64).contiguous()
    for (kind, short, long), entries in tables.grouped(rows(X, out)).items():
        table = tables.table(entries, (eps, safety), X[0].device, coefficients)
        iterate_kernel[(table.tiles,)](
            table.data, table.count, len(coefficients) // 3, norms, table.steps,
            tables.TYPES[kind], tables.TYPES[dtype], scale, short, long,
            num_warps=warps(short, long), num_stages=1, **FUSION,
        )  # fmt: skip
    return out
