"""Conda's step on a list: three launches for all matrices of one dtype, not three for each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from orthonorm import ops
from orthonorm.ops.steps import ACCELERATOR_WORK
from torch import Tensor

from . import tables
from .product import Factors, product, served
from .rotate import rotation
from .rotate_back import rotation_back
from .rotated_adam import rotated_adam_


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
    decay = 1 - lr.to(torch.float64) * weight_decay
    steps = scales * decay
    sizes = [m.numel() for m in exp_avg]
    for part in stretches(sizes, max(*sizes, ACCELERATOR_WORK)):
        moments = exp_avg[part]
        work = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in moments]
        _products(map(rotation, work, grads[part], bases[part]), bases[part])
        rotated_adam_(moments, exp_avg_sq[part], work, beta1, beta2, eps, steps[part])
        back = map(rotation_back, params[part], work, bases[part])
        _products(back, bases[part], -1.0, 1.0, decay)


def stretches(sizes: list[int], limit: int) -> list[slice]:
    """Neighbours whose sizes add up to at most `limit`, one at least."""
    found, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > limit:
            found.append(slice(begin, i))
            begin, total = i, 0
        total += size
    return [*found, slice(begin, len(sizes))]


def _products(products: Iterable[list[Factors]], bases: list[Tensor], *scalars: Any) -> None:
    """One launch for the bases of each dtype."""
    keys = (q.dtype for q in bases)
    for dtype, found in tables.grouped(zip(keys, products, strict=True)).items():
        product("product", list(chain(*found)), bases[0].device, dtype, *scalars)
