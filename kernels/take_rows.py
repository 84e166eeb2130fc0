"""Copies of some rows of matrices, and what is left of them there, for a list in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import lines, tiles


@triton.jit(do_not_specialize=["count"])
def take_kernel(
    table, count, factor, STEPS: tl.constexpr,
    OUT_TYPE: tl.constexpr, X_TYPE: tl.constexpr, WIDE: tl.constexpr,
    X_ORDER: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Write out <- x and x <- factor x for the rows x that are numbered."""
    entry, batch, first, left, length = lines.place(table, count, STEPS, ALIGNED, LINES)
    out, down, over = tiles.matrix(
        table, count, entry, batch, lines.HEAD, OUT_TYPE, X_ORDER, ALIGNED
    )
    out = tiles.corner(out, down, over, first, 0, ALIGNED)
    x, across, along = tiles.matrix(
        table, count, entry, batch, lines.HEAD + 4, X_TYPE, X_ORDER, ALIGNED
    )
    numbers, apart, _ = tiles.matrix(table, count, entry, batch, lines.HEAD + 8, tl.int64, 2, False)
    line = tl.arange(0, LINES)
    step = tl.arange(0, ALONG)
    row = tl.load(numbers + (first + line) * apart, mask=line < left, other=0)
    x_at = tiles.square(row, step, across, along)
    out_at = tiles.square(line, step, down, over)
    mu = tl.load(factor).to(WIDE)
    for start in tl.range(0, length, ALONG):
        mask = (line < left)[:, None] & (step < length - start)[None, :]
        value = tl.load(x + x_at, mask=mask, other=0.0)
        wide = value.to(WIDE)
        if tl.float64 == X_TYPE and tl.float64 != OUT_TYPE:
            tl.store(out + out_at, wide.to(tl.float32).to(OUT_TYPE), mask=mask)
        else:
            tl.store(out + out_at, wide.to(OUT_TYPE), mask=mask)
        tl.store(x + x_at, (mu * wide).to(X_TYPE), mask=mask)
        x += ALONG * along
        out += ALONG * over


def take_rows_(X: list[Tensor], rows: list[Tensor], factor: Tensor, out: list[Tensor]) -> None:
    if not X:
        return
    factor = factor.to(X[0].device)
    numbers = [r.unsqueeze(-1) for r in rows]
    for group in lines.groups(out, X, numbers, columns=False, whole=True)[0]:
        table = group.entries.table((), X[0].device)
        take_kernel[(table.tiles,)](
            table.data, table.count, factor, table.steps, *group.constants(0, 1), **lines.OPTIONS
        )
