"""All iterations of small matrices in one launch: one program per matrix keeps it on chip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from orthonorm import ops
from orthonorm.ops.words import SMALL
from torch import Tensor

from . import configs, ends, tables, tiles
from .configs import FUSION
from .ends import End, Extra
from .product import served

EXTRA = tl.constexpr(4)  # after fields first program, short and long side, first matrix: the end's
HEAD = tl.constexpr(6)  # after these: X and out
# eps and safety; then follow the end's numbers, the entries, the coefficients
NUMBERS = tl.constexpr(2)
HALF = (torch.float16, torch.bfloat16)


@triton.jit
def inside(entries, count, entry, rows, columns, ALIGNED: tl.constexpr):
    """Return the mask of these rows and columns.

    The sides are read anew every time (volatile). Else masks would take registers through all
    iterations (sm_80 spills them at 128 x 128; 2026-11).
    """
    n = tl.load(entries + count + entry, volatile=True).to(tl.int32)
    m = tl.load(entries + 2 * count + entry, volatile=True).to(tl.int32)
    if ALIGNED:  # multiples of 8, stated as in `tiles.side`
        n = n // 8 * 8
        m = m // 8 * 8
    return (rows < n)[:, None] & (columns < m)[None, :]


@triton.jit
def norm_of(
    x, down, across, entries, count, entry, columns, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return |X|_F in double, 16 rows at a time: all of X in double would not fit the registers."""
    squares = tl.zeros((16, columns.shape[0]), dtype=tl.float64)
    rows = tl.arange(0, 16)
    for start in tl.range(0, BLOCK_N, 16):
        mask = inside(entries, count, entry, start + rows, columns, ALIGNED)
        at = tiles.square(start + rows, columns, down, across)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float64)
        squares += value * value
    return tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit(do_not_specialize=["count", "iterations"])
def iterate_kernel(
    table, count, iterations, norms, first, second, STEPS: tl.constexpr,
    X_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, X_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    DOT_TYPE: tl.constexpr, SCALE: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Write the end of X after its iterations X <- a X + (b A + c A^2) X, A = X X^T; X is wide.

    X starts as X / (safety max(|X|_F, eps)), or without SCALE as X / safety.
    """
    numbers = table + NUMBERS
    entries = numbers + ends.NUMBERS
    program = tl.program_id(0).to(tl.int64)
    entry = tiles.locate(entries, count, program, STEPS)
    batch = program - tiles.field(entries, count, entry, 0)
    columns = tl.arange(0, BLOCK_M)
    x, down, across = tiles.matrix(entries, count, entry, batch, HEAD, X_TYPE, X_ORDER, ALIGNED)
    divisor = tiles.number(table, 1)
    if SCALE:
        if norms is None:
            norm = norm_of(
                x, down, across, entries, count, entry, columns, ALIGNED, BLOCK_N
            )  # fmt: skip
        else:
            norm = tl.load(norms + tiles.field(entries, count, entry, 3) + batch)
        eps = tiles.number(table, 0)
        divisor = divisor * tl.where(norm < eps, eps, norm)  # NaN stays
    inverse = tl.where(divisor == 0, 0.0, 1.0 / divisor)
    rows = tl.arange(0, BLOCK_N)
    mask = inside(entries, count, entry, rows, columns, ALIGNED)
    y = tl.load(x + tiles.square(rows, columns, down, across), mask=mask, other=0.0)
    y = (y.to(tl.float64) * inverse).to(tl.float32).to(DOT_TYPE)
    coefficients = entries + (HEAD + 8) * count
    for t in tl.range(0, iterations):
        a = tiles.number(coefficients, 3 * t).to(tl.float32)
        b = tiles.number(coefficients, 3 * t + 1).to(tl.float32)
        c = tiles.number(coefficients, 3 * t + 2).to(tl.float32)
        A = tl.dot(y, tl.trans(y))
        B = b * A
        if c != 0:
            half = A.to(DOT_TYPE)
            B += c * tl.dot(half, half)
        y = (a * y.to(tl.float32) + tl.dot(B.to(DOT_TYPE), y)).to(DOT_TYPE)
    mask = inside(entries, count, entry, rows, columns, ALIGNED)
    out, down, across = tiles.matrix(
        entries, count, entry, batch, HEAD + 4, OUT_TYPE, OUT_ORDER, ALIGNED
    )
    out += tiles.square(rows, columns, down, across)
    END(
        out, y.to(tl.float32), mask, out, out, numbers, entries, count, entry, EXTRA, first, second,
        batch, 0, 0,
    )  # fmt: skip


def block(side: int) -> int:
    """Return the power of two, 16 or more, that holds a side."""
    return max(16, 1 << (side - 1).bit_length())


def keyed(
    items: tuple[tables.Item, ...], facing: tuple[Any, Any], extras: tuple[Extra, ...]
) -> Iterator[tuple[Any, tables.Entry]]:
    """Yield (what entries of one launch have in common, entry); tall matrices are transposed.

    `facing` are the ends of wide matrices and of tall ones.
    """
    first = 0
    for item, extra in zip(items, extras, strict=True):
        if isinstance(item, int):
            first += item
            continue
        for x, y in item:
            tall = x.rows > x.columns
            if tall:
                x, y = x.mT, y.mT
            entry = (x.batch, x.rows, x.columns, first, *extra, *x.fields, *y.fields)
            yield (facing[tall], key(x, y)), entry
            first += x.batch


@tables.kept
def launches(
    items: tuple[tables.Item, ...], facing: tuple[Any, Any], extras: tuple[Extra, ...]
) -> list[tuple[Any, tuple[Any, ...], tables.Entries]]:
    """Return every launch: its end, what else its entries have in common, and these."""
    groups = tables.grouped(keyed(items, facing, extras))
    return [(*key, tables.Entries(entries)) for key, entries in groups.items()]


def key(x: tables.View, y: tables.View) -> tuple[object, ...]:
    types = (tables.TYPES[x.dtype], tables.TYPES[y.dtype])
    aligned = x.aligned and y.aligned
    return (*types, x.order, y.order, aligned, block(x.rows), block(x.columns))


def warps(arch: str, short: int, long: int) -> int:
    """Return the warps of one program, so that its accumulators stay in registers.

    On gfx942, 256 threads have 512 registers each and use 372; 512 threads have 256 each and spill
    (Triton 3.9, 2026-11).
    """
    return max(1, min(256, short * long // 32) // configs.lanes(arch))


def on_chip(x: Tensor, dtype: torch.dtype) -> bool:
    """True if both sides are small enough for this kernel, and products are Triton's.

    On older architectures Triton would multiply without tensor cores.
    """
    return dtype in HALF and max(x.shape[-2:]) <= SMALL and served("product", dtype, x)


def small_newton_schulz(
    X: list[Tensor],
    coefficients: list[float],
    dtype: torch.dtype,
    scale: bool = True,
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> list[Tensor]:
    if not X or not all(on_chip(x, dtype) for x in X):
        arguments = (X, coefficients, dtype, scale, eps, safety, norms)
        return ops.small_newton_schulz.definition(*arguments)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in X]
    target = (out, ends.STORE, [ends.PLAIN] * len(X))
    small_iterations(X, *target, coefficients, dtype, scale, eps, safety, norms)
    return out


def small_iterations(
    X: list[Tensor],
    out: list[Tensor],
    end: End,
    extras: Sequence[Extra],
    coefficients: list[float],
    dtype: torch.dtype,
    scale: bool,
    eps: float,
    safety: float,
    norms: Tensor | None,
) -> None:
    """Compute `small_newton_schulz` with an end that writes the results."""
    norms = None if norms is None else norms.to(torch.float64).contiguous()
    arch, _ = configs.device_of(X[0].device)
    facing = (end.function, end.facing(True).function)
    for function, launch, entries in launches(tables.items(X, out), facing, tuple(extras)):
        table = entries.table((eps, safety, *end.padded), X[0].device, coefficients)
        iterate_kernel[(table.tiles,)](
            table.data, table.count, len(coefficients) // 3, norms, end.first, end.second,
            table.steps, *launch, tables.TYPES[dtype], scale, function,
            num_warps=warps(arch, *launch[-2:]), num_stages=1, **FUSION,
        )  # fmt: skip
