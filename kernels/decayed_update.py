"""Weight decay and update of a list of parameters in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import tables, tiles


@triton.jit(do_not_specialize=["count"])
def decayed_update_kernel(
    table, count, lr, STEPS: tl.constexpr, W_TYPE: tl.constexpr, U_TYPE: tl.constexpr,
    WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers: weight decay; extras: the factor of each item."""
    entries = table + 1
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    w_at = each.elements(entries, count, entry, batch, start, local, 0, W_TYPE, FLAT)
    u_at = each.elements(entries, count, entry, batch, start, local, 1, U_TYPE, FLAT)
    rate = tl.load(lr).to(tl.float64)
    factor = tiles.field(entries, count, entry, each.HEAD + 8).to(tl.float64, bitcast=True)
    decay = (1.0 - rate * tiles.number(table, 0)).to(WIDE)
    step = (rate * factor).to(WIDE)
    w = tl.load(w_at, mask=mask, other=0.0).to(WIDE)
    u = tl.load(u_at, mask=mask, other=0.0).to(WIDE)
    tl.store(w_at, (decay * w - step * u).to(W_TYPE), mask=mask)


def decayed_update_(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: float,
    factors: list[float],
) -> None:
    if not params:
        return
    lr = lr.to(params[0].device)
    extras = [(tables.bits(f),) for f in factors]
    for group in each.groups([params, updates], extras):
        table = group.table((weight_decay,), params[0].device)
        decayed_update_kernel[(table.tiles,)](
            table.data, table.count, lr, table.steps, *group.constants, **each.OPTIONS
        )
