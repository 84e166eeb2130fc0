"""Matrices divided each by its own divisor and rounded once, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from . import tables, tiles

LARGEST = tl.constexpr(torch.finfo(torch.float64).max)


@triton.jit(do_not_specialize=["count"])
def divide_kernel(
    table, count, divisors, STEPS: tl.constexpr, X_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out <- x times the inverse of its divisor, in double; 0 if the divisor is 0.

    A power of two in both cancels exactly.
    """
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    out_at = each.elements(table, count, entry, batch, start, local, 1, OUT_TYPE, FLAT)
    divisor = tl.load(divisors + tiles.field(table, count, entry, 4) + batch)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float64)
    inverse = tl.where(divisor == 0, 0.0, 1.0 / divisor)
    inverse = tl.where(inverse > LARGEST, LARGEST, inverse)  # a denormal's: finite, so 0 x is 0
    inverse = tl.where(inverse < -LARGEST, -LARGEST, inverse)
    tl.store(out_at, (x * inverse).to(tl.float32).to(OUT_TYPE), mask=mask)


def divide_each(X: Tensor, divisors: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.float64 in (X.dtype, dtype) or divisors.dtype != torch.float64:
        return ops.divide_each.definition(X, divisors, dtype)
    out = torch.empty_like(X, dtype=dtype, memory_format=torch.contiguous_format)
    divide_items(tables.items([X], [out]), divisors)
    return out


def divide_items(items: tuple[tables.Item, ...], divisors: Tensor) -> None:
    """Write the first place of each item, divided, to the second; only divisors are float64."""
    divisors = divisors.contiguous()
    for group in each.groups_of(items, (), each.block_of(divisors.device)):
        table = group.table((), divisors.device)
        divide_kernel[(table.tiles,)](
            table.data, table.count, divisors, table.steps, *group.constants, **each.OPTIONS
        )
