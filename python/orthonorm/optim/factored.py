"""X <- X / (sqrt(V / (1-beta2^t)) + eps), V = r c^T / mean(r): Adafactor's second moment."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ops import factored_moment_
from .state import Batch, Updates, by_step
from .tensors import numbers


def shapes(x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the state of one matrix: r and c."""
    *batch, m, n = x.shape
    return {"row_moment": (*batch, m, 1), "column_moment": (*batch, 1, n)}


def adapt_(updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
    """Update r and c by the squares of X and the group's `beta2`, then divide X in place.

    eps is the group's `norm_eps`.
    """
    lists = (batch.state["row_moment"], batch.state["column_moment"], updates.matrices)
    beta2, eps = group["beta2"], group["norm_eps"]
    for t, indices in by_step(batch.steps):
        r, c, X = ([values[i] for i in indices] for values in lists)
        root = math.sqrt(1 - beta2**t)  # X root / (sqrt(V) + eps root)
        factored_moment_.unchecked(r, c, X, beta2, eps * root, "outside", False)
        torch._foreach_mul_(X, numbers(root, X[0].device))
    return updates
