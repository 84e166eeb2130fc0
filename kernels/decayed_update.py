"""Weight decay and update of a list of parameters in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from . import tables, tiles
from .rounding import rounded


@triton.jit(do_not_specialize=["count"])
def decayed_update_kernel(
    table, count, lr, weight_decay, seed, found_inf, STEPS: tl.constexpr,
    W_TYPE: tl.constexpr, U_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write w <- (1 - lr weight_decay) w - lr factor u, unless an infinity was found.

    Extras: factor as bits, address of the weight's first element.
    """
    entries = table
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    w_at = each.elements(entries, count, entry, batch, start, local, 0, W_TYPE, FLAT)
    u_at = each.elements(entries, count, entry, batch, start, local, 1, U_TYPE, FLAT)
    rate = tl.load(lr).to(tl.float64)
    factor = tiles.field(entries, count, entry, each.HEAD + 8).to(tl.float64, bitcast=True)
    decay = (1.0 - rate * tl.load(weight_decay).to(tl.float64)).to(WIDE)
    step = (rate * factor).to(WIDE)
    w = tl.load(w_at, mask=mask, other=0.0).to(WIDE)
    u = tl.load(u_at, mask=mask, other=0.0).to(WIDE)
    base = tiles.field(entries, count, entry, each.HEAD + 9)
    new = rounded(decay * w - step * u, w_at, base, seed, W_TYPE)
    tl.store(w_at, each.kept(found_inf, w, new).to(W_TYPE), mask=mask)


def decayed_update_(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    rounding: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    if not params:
        return
    if mantissas is not None:
        arguments = (params, updates, lr, weight_decay, factors, rounding, found_inf, mantissas)
        return ops.decayed_update_.definition(*arguments)
    lr, weight_decay = (t.to(params[0].device) for t in (lr, weight_decay))
    seed, found_inf = (t if t is None else t.to(params[0].device) for t in (rounding, found_inf))
    extras = [(tables.bits(f), w.data_ptr()) for f, w in zip(factors, params, strict=True)]
    for group in each.groups([params, updates], extras):
        table = group.table((), params[0].device)
        decayed_update_kernel[(table.tiles,)](
            table.data,
            table.count,
            lr,
            weight_decay,
            seed,
            found_inf,
            table.steps,
            *group.constants,
            **each.OPTIONS,
        )
