"""Muon's step on a list: momentum in one pass, then iterations whose last product writes the
weights, so that no orthogonalized matrix is stored."""

from __future__ import annotations

import torch
from orthonorm import ops
from orthonorm.ops.steps import ACCELERATOR_WORK
from torch import Tensor

from . import ends, tables
from .decayed_update import decayed_update_
from .muon_prologue import muon_prologue_
from .newton_schulz import Iteration, Target


def muon_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: float,
    factors: list[float],
    coefficients: list[float],
    restarts: list[int],
    nesterov: bool = True,
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    iteration = Iteration(coefficients, restarts, form, precision, scale, eps, safety)
    tensors, flags = (params, grads, momentum_buffers), (grad_scale, found_inf)
    wide = any(t.dtype == torch.float64 for some in tensors for t in some)
    if not params or wide or found_inf is not None or mantissas is not None:
        arguments = (*tensors, lr, momentum, weight_decay, factors, coefficients, restarts)
        return ops.muon_step_.definition(
            *arguments, nesterov, *iteration[2:], rounding, *flags, mantissas
        )
    lr, device = lr.to(params[0].device), params[0].device
    end = ends.muon(lr, weight_decay)
    items = [0] * len(params)
    if rounding is not None and any(w.dtype == torch.bfloat16 for w in params):
        end = ends.muon_rounded(lr, weight_decay, rounding.to(device))
        items = [w.data_ptr() for w in params]
    extras = [(tables.bits(factor), item) for factor, item in zip(factors, items, strict=True)]
    sizes = [b.numel() for b in momentum_buffers]
    for part in tables.stretches(sizes, max(*sizes, ACCELERATOR_WORK)):
        weights, states = params[part], momentum_buffers[part]
        updates = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in states]
        norms = muon_prologue_(grads[part], states, updates, momentum, nesterov, *flags)
        rows = iteration.run(updates, Target(weights, end, extras[part]), norms)
        if rows:
            polars = iteration.rest(updates, rows, norms)
            some = [weights[i] for i in rows]
            scales = [factors[part][i] for i in rows]
            decayed_update_(some, polars, lr, weight_decay, scales, rounding)
