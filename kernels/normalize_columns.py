"""Columns divided by their norms, for a list of matrices in one launch."""

from __future__ import annotations

import torch
from orthonorm import ops
from torch import Tensor

from .lines import normalize_list


def normalize_columns_(out: list[Tensor], X: list[Tensor], eps: float = 0.0) -> None:
    if any(x.dtype == torch.float64 for x in X):
        return ops.normalize_columns_.definition(out, X, eps)
    normalize_list(X, out, True, 1.0, eps)
