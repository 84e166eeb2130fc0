"""Conda's step on a list in two launches.

The first forms G' = Q^T G; its end updates the moments and writes N. The second forms Q N; its end
updates the weights.
"""

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
    weight_decay: Tensor,
) -> None:
    if not params:
        return
    lr, scales, weight_decay = (t.to(params[0].device) for t in (lr, scales, weight_decay))
    weight_decay = weight_decay.to(torch.float64)  # kept alive here: `last` holds its address
    lists = (params, grads, exp_avg, exp_avg_sq, bases)
    mine: list[int] = []
    rest: list[int] = []
    for i, matrices in enumerate(zip(*lists, strict=True)):
        (mine if served("product", bases[i].dtype, *matrices) else rest).append(i)
    if rest:
        some = ([tensors[i] for i in rest] for tensors in lists)
        numbers = (lr, beta1, beta2, eps, weight_decay)
        ops.conda_step_.definition(*some, torch.cat([scales[i : i + 1] for i in rest]), *numbers)
    first = ends.moments(beta1, beta2, eps)
    last = ends.conda(lr, weight_decay, scales.contiguous())
    sizes = [exp_avg[i].numel() for i in mine]
    for part in tables.stretches(sizes, max((*sizes, ACCELERATOR_WORK))) if mine else ():
        there, back, work = [], [], []
        for i in mine[part]:
            W, G, M, V, Q = (tensors[i] for tensors in lists)
            N = torch.empty_like(M, memory_format=torch.contiguous_format)
            there += [(Q.dtype, p) for p in rotation(N, G, Q, M, V)]
            back += [(Q.dtype, p) for p in rotation_back(W, N, Q, (ends.PLAIN[0], i))]
            work.append(N)  # keep it alive: a table holds only its address
        for products, end in ((there, first), (back, last)):
            for dtype, group in tables.grouped(products).items():
                product("product", group, W.device, dtype, end=end)
