"""AdamW on a list of parameters in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import tables, tiles
from .rounding import joined, rounded, split


@triton.jit
def stepped(
    table, t, lr, weight_decay, g, old_m, old_v, old, WIDE: tl.constexpr, DECAY_FIRST: tl.constexpr,
    CORRECT_EPS: tl.constexpr,
):  # fmt: skip
    """Return weights and averages after step t (float64) of gradients g, before they are rounded.

    Numbers: beta1, 1 - beta1, log beta1; the same of beta2; eps.
    """
    rate = tl.load(lr).to(tl.float64)
    correct1 = 1.0 - tl.exp(t * tiles.number(table, 2))
    correct2 = tl.sqrt(1.0 - tl.exp(t * tiles.number(table, 5)))
    size = (rate * correct2 / correct1).to(WIDE)
    decay = (1.0 - rate * tl.load(weight_decay).to(tl.float64)).to(WIDE)
    eps = tiles.number(table, 6)
    if CORRECT_EPS:
        eps = eps * correct2
    m = tiles.number(table, 0).to(WIDE) * old_m + tiles.number(table, 1).to(WIDE) * g
    v = tiles.number(table, 3).to(WIDE) * old_v + tiles.number(table, 4).to(WIDE) * g * g
    denominator = each.root(v) + eps.to(WIDE)
    update = tl.where(denominator == 0, 0.0, each.divide(size * m, denominator))
    if DECAY_FIRST:
        w = decay * old - update
    else:
        w = decay * (old - update)
    return w, m, v


@triton.jit(do_not_specialize=["count"])
def adamw_kernel(
    table, count, lr, weight_decay, seed, grad_scale, found_inf, STEPS: tl.constexpr,
    W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    R_TYPE: tl.constexpr, T_TYPE: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr, DECAY_FIRST: tl.constexpr, CORRECT_EPS: tl.constexpr,
):  # fmt: skip
    """Write weights, averages and mantissas of one AdamW step; R_TYPE is None without mantissas.

    Numbers: those of `stepped`. Extras: address of the step count, address of the weight's first
    element.
    """
    extras: tl.constexpr = each.HEAD + (16 if R_TYPE is None else 20)
    entries = table + 7
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    w_at = each.elements(entries, count, entry, batch, start, local, 0, W_TYPE, FLAT)
    g_at = each.elements(entries, count, entry, batch, start, local, 1, G_TYPE, FLAT)
    m_at = each.elements(entries, count, entry, batch, start, local, 2, M_TYPE, FLAT)
    v_at = each.elements(entries, count, entry, batch, start, local, 3, V_TYPE, FLAT)
    steps = tiles.field(entries, count, entry, extras).to(tl.pointer_type(T_TYPE))
    t = tl.load(steps).to(tl.float64)
    g = each.unscaled(tl.load(g_at, mask=mask, other=0.0).to(WIDE), grad_scale)
    old_m = tl.load(m_at, mask=mask, other=0.0).to(WIDE)
    old_v = tl.load(v_at, mask=mask, other=0.0).to(WIDE)
    old = tl.load(w_at, mask=mask, other=0.0)
    if R_TYPE is not None:
        r_at = each.elements(entries, count, entry, batch, start, local, 4, R_TYPE, FLAT)
        old = joined(old, tl.load(r_at, mask=mask, other=0))
    old = old.to(WIDE)
    w, m, v = stepped(
        table, t, lr, weight_decay, g, old_m, old_v, old, WIDE, DECAY_FIRST, CORRECT_EPS
    )
    tl.store(m_at, each.kept(found_inf, old_m, m).to(M_TYPE), mask=mask)
    tl.store(v_at, each.kept(found_inf, old_v, v).to(V_TYPE), mask=mask)
    if R_TYPE is None:
        w = rounded(w, w_at, tiles.field(entries, count, entry, extras + 1), seed, W_TYPE)
        tl.store(w_at, each.kept(found_inf, old, w).to(W_TYPE), mask=mask)
    else:
        high, low = split(each.kept(found_inf, old, w).to(tl.float32))
        tl.store(w_at, high, mask=mask)
        tl.store(r_at, low, mask=mask)


def advanced(steps: list[Tensor], found_inf: Tensor | None, device: torch.device) -> list[Tensor]:
    """Count this step, unless an infinity was found; return the counts on the device."""
    if found_inf is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, (found_inf.reshape(()) == 0).to(steps[0].dtype))
    return [s.to(device) for s in steps]  # torch's optimizers keep step counts on the CPU


def numbers_of(beta1: float, beta2: float, eps: float) -> list[float]:
    """Return the numbers of `stepped`."""
    betas = [n for b in (beta1, beta2) for n in (b, 1 - b, math.log(b) if b else -math.inf)]
    return [*betas, eps]


def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
    decay_first: bool = True,
    correct_eps: bool = True,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    if not params:
        return
    device = params[0].device
    steps = advanced(steps, found_inf, device)
    lr, weight_decay = lr.to(device), weight_decay.to(device)
    flags = (rounding, grad_scale, found_inf)
    seed, grad_scale, found_inf = (t if t is None else t.to(device) for t in flags)
    given = [params, grads, exp_avg, exp_avg_sq]
    given += [] if mantissas is None else [mantissas]
    numbers = numbers_of(beta1, beta2, eps)
    for dtype in {s.dtype for s in steps}:
        indices = [i for i, s in enumerate(steps) if s.dtype == dtype]
        lists = [[values[i] for i in indices] for values in given]
        extras = [(steps[i].data_ptr(), params[i].data_ptr()) for i in indices]
        for group in each.groups(lists, extras):
            table = group.table(numbers, device)
            *types, wide, flat, block = group.constants
            types += [None] * (5 - len(types))
            adamw_kernel[(table.tiles,)](
                table.data, table.count, lr, weight_decay, seed, grad_scale, found_inf, table.steps,
                *types, tables.TYPES[dtype], wide, flat, block, decay_first, correct_eps,
                **each.OPTIONS,
            )  # fmt: skip
