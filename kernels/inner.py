"""Inner products of pairs of matrices, in double: sums by tile, then one program per pair."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from .magnitude import empty_norms, norms_of


@triton.jit(do_not_specialize=["count"])
def products_kernel(
    table, count, sums, STEPS: tl.constexpr, X_TYPE: tl.constexpr, Y_TYPE: tl.constexpr,
    WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of x y over every tile."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    y_at = each.elements(table, count, entry, batch, start, local, 1, Y_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float64)
    y = tl.load(y_at, mask=mask, other=0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(x * y, axis=0))


def inner(X: list[Tensor], Y: list[Tensor]) -> Tensor:
    if not X or any(t.dtype == torch.float64 for t in (*X, *Y)):
        return ops.inner.definition(X, Y)
    totals = empty_norms(X, X[0].device)
    for group in each.groups([X, Y]):
        table = group.table((), X[0].device)
        sums = torch.empty(table.tiles, dtype=torch.float64, device=X[0].device)
        products_kernel[(table.tiles,)](
            table.data, table.count, sums, table.steps, *group.constants, **each.OPTIONS
        )
        norms_of(table, sums, totals, root=False)
    return totals
