"""Muon's step on a list: momentum in one pass, then iterations.

The last product of the iterations writes the weights, so no orthogonalized matrix is stored.
"""

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
    weight_decay: Tensor,
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
    tensors = (params, grads, momentum_buffers)
    wide = any(t.dtype == torch.float64 for some in tensors for t in some)
    if not params or wide or mantissas is not None:
        arguments = (*tensors, lr, momentum, weight_decay, factors, coefficients, restarts)
        return ops.muon_step_.definition(
            *arguments, nesterov, *iteration[2:], rounding, grad_scale, found_inf, mantissas
        )
    device = params[0].device
    lr, weight_decay = lr.to(device), weight_decay.to(device, torch.float64)
    grad_scale, rounding = (t if t is None else t.to(device) for t in (grad_scale, rounding))
    if found_inf is not None:
        found_inf = (found_inf.to(device) != 0).float()
    seed = rounding if any(w.dtype == torch.bfloat16 for w in params) else None
    # of weight_decay and found_inf `end` holds addresses only: they are kept alive here
    end = ends.muon(lr, weight_decay, seed, found_inf)
    items = [0 if seed is None else w.data_ptr() for w in params]
    extras = [(tables.bits(factor), item) for factor, item in zip(factors, items, strict=True)]
    sizes = [b.numel() for b in momentum_buffers]
    for part in tables.stretches(sizes, max(*sizes, ACCELERATOR_WORK)):
        weights, states = params[part], momentum_buffers[part]
        updates = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in states]
        flags = (grad_scale, found_inf)
        norms = muon_prologue_(grads[part], states, updates, momentum, nesterov, *flags)
        left = iteration.run(updates, Target(weights, end, extras[part]), norms)
        if left:
            polars = iteration.rest(updates, left, norms)
            some = [weights[i] for i in left]
            scales = [factors[part][i] for i in left]
            decayed_update_(some, polars, lr, weight_decay, scales, seed, found_inf)
