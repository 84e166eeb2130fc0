"""Every row divided by its norm, in one launch."""

from __future__ import annotations

import torch
from orthonorm import ops
from torch import Tensor

from .lines import normalize


def row_normalize(
    X: Tensor, scale: float = 1.0, eps: float = 0.0, eps_at: str = "outside"
) -> Tensor:
    if X.dtype == torch.float64:
        return ops.row_normalize.definition(X, scale, eps, eps_at)
    return normalize(X, False, scale, eps, eps_at)
