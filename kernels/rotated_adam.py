"""Adam's moments and update in the rotated basis, in one pass over the whole list."""

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
    """Write `elementwise.adam` of every element."""
    entries = table + 5
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    m_at = each.elements(entries, count, entry, batch, start, local, 0, M_TYPE, FLAT)
    v_at = each.elements(entries, count, entry, batch, start, local, 1, V_TYPE, FLAT)
    x_at = each.elements(entries, count, entry, batch, start, local, 2, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(WIDE)
    scale = None
    if scales is not None:
        scale = tl.load(scales + tiles.field(entries, count, entry, 5)).to(WIDE)
    each.adam(x_at, m_at, v_at, x, mask, table, WIDE, scale)


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
