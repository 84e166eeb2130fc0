"""Momentum, updates (Nesterov or not) and their norms, of a list in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from .magnitude import empty_norms, norms_of


@triton.jit(do_not_specialize=["count"])
def prologue_kernel(
    table, count, momentum, grad_scale, found_inf, sums, STEPS: tl.constexpr,
    G_TYPE: tl.constexpr, B_TYPE: tl.constexpr, U_TYPE: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """Write b <- g + mu (b - g), the update u, and sums of u^2 by tile.

    u = b, or with NESTEROV u = g + mu (b - g) of the new b.
    """
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    g_at = each.elements(table, count, entry, batch, start, local, 0, G_TYPE, FLAT)
    b_at = each.elements(table, count, entry, batch, start, local, 1, B_TYPE, FLAT)
    u_at = each.elements(table, count, entry, batch, start, local, 2, U_TYPE, FLAT)
    mu = tl.load(momentum).to(WIDE)
    g = each.unscaled(tl.load(g_at, mask=mask, other=0.0).to(WIDE), grad_scale)
    old = tl.load(b_at, mask=mask, other=0.0).to(WIDE)
    b = g + mu * (old - g)
    u = b
    if NESTEROV:
        u = g + mu * (b - g)
    tl.store(b_at, each.kept(found_inf, old, b).to(B_TYPE), mask=mask)
    tl.store(u_at, u.to(U_TYPE), mask=mask)
    u = tl.where(mask, u, 0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(u * u, axis=0))


def muon_prologue_(
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    updates: list[Tensor],
    momentum: Tensor,
    nesterov: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    lists = [grads, momentum_buffers, updates]
    if not grads or any(t.dtype == torch.float64 for tensors in lists for t in tensors):
        arguments = (grads, momentum_buffers, updates, momentum, nesterov)
        return ops.muon_prologue_.definition(*arguments, grad_scale, found_inf)
    device = grads[0].device
    momentum = momentum.to(device)
    flags = [t if t is None else t.to(device) for t in (grad_scale, found_inf)]
    norms = empty_norms(grads, device)
    for group in each.groups(lists):
        table = group.table((), device)
        sums = torch.empty(table.tiles, dtype=torch.float64, device=device)
        prologue_kernel[(table.tiles,)](
            table.data, table.count, momentum, *flags, sums, table.steps, *group.constants,
            nesterov, **each.OPTIONS,
        )  # fmt: skip
        norms_of(table, sums, norms)
    return norms
