"""Signs of a list of tensors in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each


@triton.jit(do_not_specialize=["count"])
def sign_kernel(
    table, count, STEPS: tl.constexpr, X_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x <- sign(x), or NaN where x is not finite."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    x = tl.load(at, mask=mask, other=0.0).to(WIDE)
    sign = tl.where(x < 0, -1.0, tl.where(x > 0, 1.0, 0.0)) + (x - x)
    tl.store(at, sign.to(X_TYPE), mask=mask)


def sign_(X: list[Tensor]) -> None:
    for group in each.groups([X]):
        table = group.table((), X[0].device)
        sign_kernel[(table.tiles,)](
            table.data, table.count, table.steps, *group.constants, **each.OPTIONS
        )
