"""Conda's step on a list in two launches: G' = Q^T G, at whose end the moments are updated and N is
written, and Q N, at whose end the weights are."""

from __future__ import annotations

import torch
from orthonorm import ops
from orthonorm.ops.steps import ACCELERATOR_WORK
from torch import Tensor

from . import ends, tables
from .product import product, served
from .rotate import rotation
from .rotate_back import rotation_back


def conda_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    bases: list[Tensor],
    scales: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    arguments = (params, grads, exp_avg, exp_avg_sq, bases, scales, lr, beta1, beta2, eps)
    dtypes = {t.dtype for tensors in (params, grads, bases) for t in tensors}
    if not params or not served("product", params[0].device, *dtypes):
        return ops.conda_step_.definition(*arguments, weight_decay)
    device = params[0].device
    lr, scales = lr.to(device), scales.to(device).contiguous()
    first = ends.moments(beta1, beta2, eps)
    last = ends.conda(lr, weight_decay, scales)
    sizes = [m.numel() for m in exp_avg]
    for part in tables.stretches(sizes, max(*sizes, ACCELERATOR_WORK)):
        work = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in exp_avg[part]]
        there, back = [], []
        for i, out in enumerate(work, part.start):
            key = bases[i].dtype
            rotated = rotation(out, grads[i], bases[i], exp_avg[i], exp_avg_sq[i])
            there += [(key, p) for p in rotated]
            extra = (ends.PLAIN[0], i)
            back += [(key, p) for p in rotation_back(params[i], out, bases[i], extra)]
        for products, end in ((there, first), (back, last)):
            for dtype, group in tables.grouped(products).items():
                product("product", group, device, dtype, end=end)
