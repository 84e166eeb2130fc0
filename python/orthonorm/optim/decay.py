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
    weight_decay: float,
    factors: Sequence[float],
    group: Mapping[str, Any],
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    """Apply updates and the group's kind of decay to `params`; `updates` may be overwritten."""
    kind, rest = group["decay"], (seed_of(group), found_inf, mantissas)
    if weight_decay == 0 or kind == "decoupled":
        decayed_update_.unchecked(params, updates, lr, weight_decay, list(factors), *rest)
        return
    for i, (w, u, factor) in enumerate(zip(params, updates, factors, strict=True)):
        w = w if mantissas is None else joined(w, mantissas[i])
        if kind == "cautious":
            kept = torch.where(u * w >= 0, w, 0.0)
        else:
            kept = w - hard_cap(w, size(w, group["bound"]))
        # not add_: torch.compile rounds its product separately (torch 2.11)
        u.mul_(factor).sub_(kept, alpha=-weight_decay)
    decayed_update_.unchecked(params, updates, lr, 0.0, [1.0] * len(updates), *rest)
