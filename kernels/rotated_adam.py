"""Elementwise moments in the rotated basis, one pass over the whole list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import tiles


@triton.jit(do_not_specialize=["count"])
def rotated_adam_kernel(
    table, count, scales, STEPS: tl.constexpr,
    M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, X_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers: beta1, 1 - beta1, beta2, 1 - beta2, eps."""
    entries = table + 5
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    m_at = each.elements(entries, count, entry, batch, start, local, 0, M_TYPE, FLAT)
    v_at = each.elements(entries, count, entry, batch, start, local, 1, V_TYPE, FLAT)
    x_at = each.elements(entries, count, entry, batch, start, local, 2, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(WIDE)
    m = tl.load(m_at, mask=mask, other=0.0).to(WIDE)
    v = tl.load(v_at, mask=mask, other=0.0).to(WIDE)
    m = tiles.number(table, 0).to(WIDE) * m + tiles.number(table, 1).to(WIDE) * x
    v = tiles.number(table, 2).to(WIDE) * v + tiles.number(table, 3).to(WIDE) * x * x
    denominator = each.root(v) + tiles.number(table, 4).to(WIDE)
    x = tl.where(denominator == 0, 0.0, each.divide(m, denominator))
    if scales is not None:
        x = x * tl.load(scales + tiles.field(entries, count, entry, 5)).to(WIDE)
    tl.store(m_at, m.to(M_TYPE), mask=mask)
    tl.store(v_at, v.to(V_TYPE), mask=mask)
    tl.store(x_at, x.to(X_TYPE), mask=mask)


def rotated_adam_(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    X: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    scales: Tensor | None = None,
) -> None:
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, eps)
    if not X:
        return
    scales = None if scales is None else scales.to(X[0].device).contiguous()
    for group in each.groups([exp_avg, exp_avg_sq, X]):
        table = group.table(numbers, X[0].device)
        rotated_adam_kernel[(table.tiles,)](
            table.data, table.count, scales, table.steps, *group.constants, **each.OPTIONS
        )
