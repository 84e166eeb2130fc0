"""W <- W - lr (factor U + weight_decay D(W)): the three kinds of weight decay, D.

decoupled: D(W) = W (arXiv:1711.05101).
cautious: D(W) = W where U W >= 0, else 0: decay never works against the update (arXiv:2510.12402).
clipped: D(W) = W - hard_cap(W): only the part of the singular values above the group's
    `bound` sqrt(m/n) (leloykun.github.io/ponder/spectral-clipping).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn.lipschitz import hard_cap
from ..ops import decayed_update_
from ..ops.mantissa import joined
from .constraints import size
from .storage import seed_of


def decayed_update(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: Sequence[float],
    group: Mapping[str, Any],
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    """Apply updates and the group's kind of decay to `params`; `updates` may be overwritten."""
    kind, rest = group["decay"], (seed_of(group), found_inf, mantissas)
    if kind not in ("cautious", "clipped"):
        decayed_update_.unchecked(params, updates, lr, weight_decay, list(factors), *rest)
        return
    # a tensor is not asked, as the host would wait for it: with a 0 in it the bits are the same
    known = group.get("weight_decay")
    decays = isinstance(known, Tensor) or known != 0
    for i, (w, u, factor) in enumerate(zip(params, updates, factors, strict=True)):
        if decays:
            w = w if mantissas is None else joined(w, mantissas[i])
            lost = decayed(w, u, group).to(torch.promote_types(u.dtype, torch.float32))
            u.mul_(factor).add_(lost.mul_(weight_decay))
        else:
            u.mul_(factor)
    zero = torch.zeros_like(weight_decay)
    decayed_update_.unchecked(params, updates, lr, zero, [1.0] * len(updates), *rest)


def decayed(w: Tensor, u: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return D(W), what the group's decay takes a part of."""
    if group["decay"] == "cautious":
        return torch.where(u * w >= 0, w, 0.0)
    return w - hard_cap(w, size(w, group["bound"]))
