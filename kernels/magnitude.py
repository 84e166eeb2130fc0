"""Frobenius norms of a list, in double: sums of squares by tile, then one program per matrix.

Each matrix is cut into tiles alone, and these are added in order. So results do not depend on
company.

Where a scale is all that is needed, the power of two at a matrix's largest magnitude is one.
Magnitudes are compared as bits. So nothing overflows, and nothing is converted to double, in which
many GPUs are slow.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from . import tables, tiles
from .configs import FUSION

CHUNK = 256  # sums of tiles added at a time
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # the bits of a float32 but for its sign
EXPONENT = tl.constexpr(0x7FF0000000000000)  # of a float64


@triton.jit(do_not_specialize=["count"])
def squares_kernel(
    table, count, sums, STEPS: tl.constexpr, X_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of squares of every tile."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, axis=0))


@triton.jit(do_not_specialize=["count"])
def norms_kernel(
    entries, count, sums, norms, STEPS: tl.constexpr, CHUNK: tl.constexpr, ROOT: tl.constexpr
):  # fmt: skip
    """Write norms[first matrix + batch]: the sum over a matrix's tiles, or its root."""
    matrix = tl.program_id(0).to(tl.int64)
    entry, batch = tiles.locate_matrix(entries, count, matrix, each.MATRICES, STEPS)
    first = tiles.field(entries, count, entry, 0)
    size = tiles.field(entries, count, entry, 1)
    at = sums + first + batch * size
    total = tl.zeros((CHUNK,), dtype=tl.float64)
    local = tl.arange(0, CHUNK)
    for start in range(0, size, CHUNK):
        total += tl.load(at + start + local, mask=local < size - start, other=0.0)
    norm = tl.sum(total, axis=0)
    if ROOT:
        norm = tl.sqrt(norm)
    tl.store(norms + tiles.field(entries, count, entry, 4) + batch, norm)


def norms_of(table: tables.Table, sums: Tensor, norms: Tensor, root: bool = True) -> None:
    """Write every matrix's norm from sums of squares by tile; without `root`, its sum."""
    norms_kernel[(table.matrices,)](
        table.data, table.count, sums, norms, table.steps, CHUNK, root, num_warps=4, **FUSION
    )


def empty_norms(X: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return memory for the norm of every matrix, filled with 0, the norm of an empty one."""
    counts = (x.shape[:-2].numel() for x in X)
    return torch.zeros(sum(counts), dtype=torch.float64, device=device)


def magnitude(X: list[Tensor]) -> Tensor:
    if not X or any(x.dtype == torch.float64 for x in X):
        return ops.magnitude.definition(X)
    norms = empty_norms(X, X[0].device)
    for group in each.groups([X]):
        table = group.table((), X[0].device)
        sums = torch.empty(table.tiles, dtype=torch.float64, device=X[0].device)
        squares_kernel[(table.tiles,)](
            table.data, table.count, sums, table.steps, *group.constants, **each.OPTIONS
        )
        norms_of(table, sums, norms)
    return norms


@triton.jit(do_not_specialize=["count"])
def peaks_kernel(
    table, count, peaks, STEPS: tl.constexpr, X_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the largest magnitude of every tile as bits, which are NaN's if it has one."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(peaks + tl.program_id(0), tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=0))


@triton.jit(do_not_specialize=["count"])
def powers_kernel(entries, count, peaks, powers, STEPS: tl.constexpr, CHUNK: tl.constexpr):
    """Write every matrix's power of two: not above its peak; 0 of 0, infinity if not finite."""
    matrix = tl.program_id(0).to(tl.int64)
    entry, batch = tiles.locate_matrix(entries, count, matrix, each.MATRICES, STEPS)
    size = tiles.field(entries, count, entry, 1)
    at = peaks + tiles.field(entries, count, entry, 0) + batch * size
    peak = tl.zeros((CHUNK,), dtype=tl.int32)
    local = tl.arange(0, CHUNK)
    for start in tl.range(0, size, CHUNK):
        peak = tl.maximum(peak, tl.load(at + start + local, mask=local < size - start, other=0))
    value = tl.max(peak, axis=0).to(tl.float32, bitcast=True).to(tl.float64)
    power = (value.to(tl.int64, bitcast=True) & EXPONENT).to(tl.float64, bitcast=True)
    tl.store(powers + tiles.field(entries, count, entry, 4) + batch, power)


def powers_of(X: list[Tensor]) -> Tensor:
    """Return the power of two of every matrix, float64."""
    device = X[0].device
    powers = empty_norms(X, device)
    for group in each.groups([X]):
        table = group.table((), device)
        peaks = torch.empty(table.tiles, dtype=torch.int32, device=device)
        peaks_kernel[(table.tiles,)](
            table.data, table.count, peaks, table.steps, *group.constants, **each.OPTIONS
        )
        powers_kernel[(table.matrices,)](
            table.data, table.count, peaks, powers, table.steps, CHUNK, num_warps=4, **FUSION
        )
    return powers
