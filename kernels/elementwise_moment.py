"""Second moments of elements, matrices divided by their roots, and norms of these, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from . import tiles
from .magnitude import empty_norms, norms_of


@triton.jit(do_not_specialize=["count"])
def elementwise_moment_kernel(
    table, count, corrections, sums, STEPS: tl.constexpr,
    V_TYPE: tl.constexpr, X_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write v <- beta2 v + (1 - beta2) x^2, then x <- x / (c sqrt(v) + eps), and sums of x^2.

    Numbers: beta2, 1 - beta2, eps. c is the item's correction, or 1.
    """
    entries = table + 3
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    v_at = each.elements(entries, count, entry, batch, start, local, 0, V_TYPE, FLAT)
    x_at = each.elements(entries, count, entry, batch, start, local, 1, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(WIDE)
    v = tl.load(v_at, mask=mask, other=0.0).to(WIDE)
    v = tiles.number(table, 0).to(WIDE) * v + tiles.number(table, 1).to(WIDE) * x * x
    denominator = each.root(v)
    if corrections is not None:
        denominator *= tl.load(corrections + tiles.field(entries, count, entry, 5)).to(WIDE)
    denominator += tiles.number(table, 2).to(WIDE)
    x = tl.where(denominator == 0, 0.0, each.divide(x, denominator))
    tl.store(v_at, v.to(V_TYPE), mask=mask)
    tl.store(x_at, x.to(X_TYPE), mask=mask)
    x = tl.where(mask, x, 0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, axis=0))


def elementwise_moment_(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    corrections: Tensor | None = None,
) -> Tensor:
    if not X or any(t.dtype == torch.float64 for t in (*moments, *X)):
        return ops.elementwise_moment_.definition(moments, X, beta2, eps, corrections)
    device = X[0].device
    corrections = None if corrections is None else corrections.to(device).contiguous()
    norms = empty_norms(X, device)
    for group in each.groups([moments, X]):
        table = group.table((beta2, 1 - beta2, eps), device)
        sums = torch.empty(table.tiles, dtype=torch.float64, device=device)
        elementwise_moment_kernel[(table.tiles,)](
            table.data, table.count, corrections, sums, table.steps, *group.constants,
            **each.OPTIONS,
        )  # fmt: skip
        norms_of(group.table((), device), sums, norms)  # a table without numbers
    return norms
