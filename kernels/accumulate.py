"""Sums of matrices, and sums of absolute values of their rows, for a list in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import lines, tiles


@triton.jit(do_not_specialize=["count"])
def accumulate_kernel(
    table, count, STEPS: tl.constexpr,
    S_TYPE: tl.constexpr, X_TYPE: tl.constexpr, Z_TYPE: tl.constexpr, WIDE: tl.constexpr,
    X_ORDER: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Write s <- s + x, and the sum of |s| of every row, of s as it is stored."""
    entry, batch, first, left, length = lines.place(table, count, STEPS, ALIGNED, LINES)
    s, across, along = tiles.matrix(
        table, count, entry, batch, lines.HEAD, S_TYPE, X_ORDER, ALIGNED
    )
    s = tiles.corner(s, across, along, first, 0, ALIGNED)
    x, down, over = tiles.matrix(
        table, count, entry, batch, lines.HEAD + 4, X_TYPE, X_ORDER, ALIGNED
    )
    x = tiles.corner(x, down, over, first, 0, ALIGNED)
    line = tl.arange(0, LINES)
    step = tl.arange(0, ALONG)
    at = tiles.square(line, step, across, along)
    x_at = tiles.square(line, step, down, over)
    total = tl.zeros((LINES, ALONG), dtype=tl.float64)
    for start in tl.range(0, length, ALONG):
        mask = (line < left)[:, None] & (step < length - start)[None, :]
        value = tl.load(s + at, mask=mask, other=0.0).to(WIDE)
        value += tl.load(x + x_at, mask=mask, other=0.0).to(WIDE)
        value = value.to(S_TYPE)
        tl.store(s + at, value, mask=mask)
        total += tl.abs(value.to(tl.float64))
        s += ALONG * along
        x += ALONG * over
    z, apart, _ = tiles.matrix(table, count, entry, batch, lines.HEAD + 8, Z_TYPE, 2, False)
    size = tl.sum(total, axis=1)
    if tl.float64 != Z_TYPE:
        size = size.to(tl.float32)
    tl.store(z + (first + line) * apart, size.to(Z_TYPE), mask=line < left)


def accumulate_(sums: list[Tensor], X: list[Tensor], sizes: list[Tensor]) -> None:
    if any(s.numel() == 0 for s in sums):  # its rows have sizes, but no launch has its elements
        return ops.accumulate_.definition(sums, X, sizes)
    if not sums:
        return
    columns = [z.unsqueeze(-1) for z in sizes]
    for group in lines.groups(sums, X, columns, columns=False, whole=True)[0]:
        table = group.entries.table((), sums[0].device)
        wide = tl.float64 if tl.float64 in group.types[:2] else tl.float32
        constants = group._replace(wide=wide).constants(0, 1, 2)
        accumulate_kernel[(table.tiles,)](
            table.data, table.count, table.steps, *constants, **lines.OPTIONS
        )
