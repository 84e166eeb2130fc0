"""Adafactor's rank-one moment, and matrices divided by its root, in two passes or three.

The first pass sums rows and columns, the last one divides. If the norm is kept, a pass between them
measures the norm of the result. Sums of rows and columns cannot give it, because eps keeps their
factors from separating.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import lines, tables, tiles, totals

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit(do_not_specialize=["count", "blocks"])
def columns_kernel(
    table, count, blocks, parts, moments, sums, whole, STEPS: tl.constexpr, V_TYPE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write c <- beta2 c + (1 - beta2) mean for every column, from the sums of all programs.

    The first block of a matrix also adds up what else its programs have summed.
    """
    entries = table + 3
    entry, batch, block = lines.lane_block(entries, count, blocks, STEPS)
    if block == 0:
        totals.add_up(entries, count, entry, batch, sums, whole)
    length = tiles.field(entries, count, entry, 3)
    if block * lines.LANES < length:
        lane = block * lines.LANES + tl.arange(0, lines.LANES)
        total = lines.sum_of_parts(entries, count, entry, batch, length, parts, lane)
        v, _, step = tiles.matrix(entries, count, entry, batch, lines.HEAD + 8, V_TYPE, 2, False)
        old = tl.load(v + lane * step, mask=lane < length, other=0.0).to(tl.float64)
        mean = total / tiles.field(entries, count, entry, 2)
        new = tiles.number(table, 0) * old + tiles.number(table, 1) * mean
        lines.settle()
        tl.store(v + lane * step, new.to(WIDE).to(V_TYPE), mask=lane < length)
        at = tiles.field(entries, count, entry, 5) + batch * length + lane
        tl.store(moments + at, new, mask=lane < length)


@triton.jit(do_not_specialize=["count"])
def factored_kernel(
    table, count, row_moments, column_moments, sums, whole, STEPS: tl.constexpr,
    X_TYPE: tl.constexpr, V_TYPE: tl.constexpr, WIDE: tl.constexpr, X_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr, EPS_AT: tl.constexpr,
    KEEP_NORM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Write x <- x / (sqrt(r c / mean r) + eps) if WRITE, else sums of the squares of that.

    Numbers: beta2, 1 - beta2, eps.
    """
    entries = table + 3
    entry, batch, first, left, length = lines.place(entries, count, STEPS, ALIGNED, LINES)
    line = tl.arange(0, LINES)
    step = tl.arange(0, ALONG)
    eps = tiles.number(table, 2).to(WIDE)
    rows = tiles.field(entries, count, entry, 2)
    row_moments += tiles.field(entries, count, entry, 4) + batch * rows + first
    column_moments += tiles.field(entries, count, entry, 5) + batch * length
    mean = totals.total(entries, count, entry, batch, whole, 2) / rows
    ratio = tl.load(row_moments + line, mask=line < left, other=0.0) / mean
    ratio = tl.where(mean == 0, 0.0, ratio).to(WIDE)
    norm = mean * 0 + 1.0
    if KEEP_NORM and WRITE:
        norm = totals.norm_ratio(entries, count, entry, batch, whole)
    x, across, along = tiles.matrix(
        entries, count, entry, batch, lines.HEAD, X_TYPE, X_ORDER, ALIGNED
    )
    x = tiles.corner(x, across, along, first, 0, ALIGNED)
    at = tiles.square(line, step, across, along)
    total = tl.zeros((LINES, ALONG), dtype=tl.float64)
    for start in tl.range(0, length, ALONG):
        mask = (line < left)[:, None] & (step < length - start)[None, :]
        column = tl.load(column_moments + start + step, mask=step < length - start, other=0.0)
        if tl.float32 == WIDE:  # a finite column, so that 0 times it is 0
            column = tl.where(column > LARGEST, LARGEST, column)
        column = column.to(WIDE)
        below = lines.denominator(ratio[:, None] * column[None, :], eps, EPS_AT)
        value = tl.load(x + at, mask=mask, other=0.0).to(WIDE)
        value = tl.where(below == 0, 0.0, each.divide(value, below))
        if WRITE:
            tl.store(x + at, (value * norm.to(WIDE)).to(X_TYPE), mask=mask)
        else:
            total += tl.where(mask, value.to(tl.float64) * value.to(tl.float64), 0.0)
        x += ALONG * along
    if not WRITE:
        squares = tl.sum(tl.sum(total, axis=1), axis=0)
        tl.store(sums + tl.program_id(0).to(tl.int64) * totals.SUMS + 1, squares)


def factored_moment_(
    row_moments: list[Tensor],
    column_moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    if not X:
        return
    device, numbers = X[0].device, (beta2, 1 - beta2, eps)
    launches, sizes = lines.groups(
        X, row_moments, column_moments, columns=False, whole=False, parts=True
    )
    rows, columns, parts = (torch.empty(n, dtype=torch.float64, device=device) for n in sizes)
    for group in launches:
        table = group.entries.table(numbers, device)
        sums, whole = totals.memory(table, device)
        common, steps = (table.data, table.count), (table.steps, *group.constants(0, 1))
        lines.moments_kernel[(table.tiles,)](
            *common, rows, sums, parts, *steps, lines.RAW.value, **lines.options(*group.blocks)
        )
        blocks = tables.cdiv(max(entry[3] for entry in group.entries.entries), lines.LANES.value)
        columns_kernel[(table.matrices * blocks,)](
            *common, blocks, parts, columns, sums, whole, table.steps, group.types[2], group.wide,
            **lines.OPTIONS,
        )  # fmt: skip
        for write in (False, True) if keep_norm else (True,):
            if write and keep_norm:
                totals.write(table, len(numbers), sums, whole)
            factored_kernel[(table.tiles,)](
                *common, rows, columns, sums, whole, *steps, lines.EPS_AT[eps_at], keep_norm, write,
                **lines.options(*group.blocks),
            )  # fmt: skip
