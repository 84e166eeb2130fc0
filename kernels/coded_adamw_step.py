"""AdamW on a list of parameters whose averages are codes of 8 bits, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from orthonorm.ops.blocks import table_of
from torch import Tensor

from . import elementwise as each
from . import tables, tiles
from .adamw_step import advanced, numbers_of, stepped
from .quantize_blocks import GRAIN, coded, decoded, encoded, intervals_of, scales_at
from .rounding import rounded

BLOCK = 2048  # elements of a program: 4096 take all registers, and spill at any strides


@triton.jit
def averages(codes_at, scales_at, mask, inside, values, WIDE: tl.constexpr):
    """Return codes and scales as they are kept, and the averages that they stand for."""
    code = tl.load(codes_at, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales_at, mask=inside, other=0.0)
    value = decoded(code, scale.to(tl.float32), values)
    return code, scale, tl.reshape(value, code.shape).to(WIDE)


@triton.jit
def keep(codes_at, scales_at, mask, inside, new, code, scale, intervals, found_inf,
         SIGNED: tl.constexpr):  # fmt: skip
    """Write averages as codes and scales; if an infinity was found, those that were read."""
    new = tl.where(mask, new.to(tl.float32), 0.0)  # what is outside has no part in a scale
    rows = tl.reshape(new, (new.shape[0] // GRAIN, GRAIN))
    new_code, new_scale = encoded(rows, intervals, SIGNED)
    new_code = each.kept(found_inf, code, tl.reshape(new_code, code.shape))
    new_scale = each.kept(found_inf, scale, new_scale.to(scale.dtype))
    tl.store(codes_at, new_code.to(tl.uint8), mask=mask)
    tl.store(scales_at, new_scale, mask=inside)


@triton.jit(do_not_specialize=["count"])
def coded_adamw_kernel(
    table, count, m_values, v_values, m_intervals, v_intervals, lr, weight_decay, seed, grad_scale,
    found_inf, STEPS: tl.constexpr, W_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    M_CODES_TYPE: tl.constexpr, V_CODES_TYPE: tl.constexpr, M_SCALES_TYPE: tl.constexpr,
    V_SCALES_TYPE: tl.constexpr, T_TYPE: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr, DECAY_FIRST: tl.constexpr, CORRECT_EPS: tl.constexpr,
):  # fmt: skip
    """Write weights, codes and scales of one AdamW step.

    Numbers: those of `stepped`. Extras: address of the step count, address of the weight's first
    element.
    """
    extras: tl.constexpr = each.HEAD + 24
    entries = table + 7
    entry, batch, start, local, mask = each.place(entries, count, STEPS, FLAT, BLOCK)
    w_at = each.elements(entries, count, entry, batch, start, local, 0, W_TYPE, FLAT)
    g_at = each.elements(entries, count, entry, batch, start, local, 1, G_TYPE, FLAT)
    m_at = each.elements(entries, count, entry, batch, start, local, 2, M_CODES_TYPE, FLAT)
    v_at = each.elements(entries, count, entry, batch, start, local, 3, V_CODES_TYPE, FLAT)
    m_scales, inside = scales_at(entries, count, entry, batch, start, 4, M_SCALES_TYPE, BLOCK)
    v_scales, inside = scales_at(entries, count, entry, batch, start, 5, V_SCALES_TYPE, BLOCK)
    steps = tiles.field(entries, count, entry, extras).to(tl.pointer_type(T_TYPE))
    t = tl.load(steps).to(tl.float64)
    g = each.unscaled(tl.load(g_at, mask=mask, other=0.0).to(WIDE), grad_scale)
    old = tl.load(w_at, mask=mask, other=0.0)
    m_code, m_scale, old_m = averages(m_at, m_scales, mask, inside, m_values, WIDE)
    v_code, v_scale, old_v = averages(v_at, v_scales, mask, inside, v_values, WIDE)
    w, m, v = stepped(
        table, t, lr, weight_decay, g, old_m, old_v, old.to(WIDE), WIDE, DECAY_FIRST, CORRECT_EPS
    )
    keep(m_at, m_scales, mask, inside, m, m_code, m_scale, m_intervals, found_inf, True)
    keep(v_at, v_scales, mask, inside, v, v_code, v_scale, v_intervals, found_inf, False)
    w = rounded(w, w_at, tiles.field(entries, count, entry, extras + 1), seed, W_TYPE)
    tl.store(w_at, each.kept(found_inf, old, w).to(W_TYPE), mask=mask)


def by_rows(t: Tensor, batch: int) -> Tensor | None:
    """View what is behind `batch` dimensions as matrices of the same order, None if none is it."""
    if t.dim() == batch + 2:
        return t
    if t.dim() < batch + 2:
        return t.unflatten(-1, (1, -1)) if t.dim() > batch else t[..., None, None]
    return t.flatten(batch).unsqueeze(-2) if t.is_contiguous() else None


def coded_adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
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
) -> None:
    lists = (params, grads, exp_avg, exp_avg_sq, exp_avg_scales, exp_avg_sq_scales, steps)
    flags = (rounding, grad_scale, found_inf)
    served: list[tuple[Tensor, ...]] = []
    others: list[tuple[Tensor, ...]] = []
    for item in zip(*lists, strict=True):
        *tensors, m_scales, v_scales, step = item
        views = [by_rows(t, m_scales.dim() - 1) for t in tensors]
        if any(v is None or v.dtype == torch.float64 for v in (*views, m_scales, v_scales)):
            others.append(item)
        else:
            served.append((*views, m_scales, v_scales, step))  # type: ignore[arg-type]
    if others:
        rest = (lr, beta1, beta2, eps, weight_decay, decay_first, correct_eps, *flags)
        ops.coded_adamw_step_.definition(*map(list, zip(*others, strict=True)), *rest)
    if not served:
        return
    device = served[0][0].device
    *views, counts = map(list, zip(*served, strict=True))
    counts = advanced(counts, found_inf, device)
    lr, weight_decay = lr.to(device), weight_decay.to(device)
    seed, grad_scale, found_inf = (t if t is None else t.to(device) for t in flags)
    numbers = numbers_of(beta1, beta2, eps)
    tables_of = [table_of(signed, device) for signed in (True, False)]
    tables_of += [intervals_of(signed, device) for signed in (True, False)]
    for dtype in {s.dtype for s in counts}:
        some = [i for i, s in enumerate(counts) if s.dtype == dtype]
        given = [[values[i] for i in some] for values in views]
        extras = [(counts[i].data_ptr(), views[0][i].data_ptr()) for i in some]
        for group in coded(given[:4], given[4:], extras, BLOCK):
            table = group.table(numbers, device)
            *types, wide, flat, block = group.constants
            coded_adamw_kernel[(table.tiles,)](
                table.data, table.count, *tables_of, lr, weight_decay, seed, grad_scale, found_inf,
                table.steps, *types, tables.TYPES[dtype], wide, flat, block, decay_first,
                correct_eps, **each.OPTIONS,
            )  # fmt: skip
