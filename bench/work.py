"""Nominal FLOPs of each op, from the arguments of a case."""

from __future__ import annotations

import math

import torch
from orthonorm.ops.polar_iteration import STEPS
from torch import Tensor

from .inputs import Arguments


def sides(t: Tensor) -> tuple[int, int, int]:
    """Return (matrices in the batch, short side, long side)."""
    n, m = sorted(t.shape[-2:])
    return math.prod(t.shape[:-2]), n, m


def polynomial(arguments: Arguments) -> float:
    """Return the FLOPs of the direct form: per step 4 n^2 m + 2 n^3, or 4 n^2 m if c = 0."""
    squares = arguments["coefficients"][2::3]
    total = 0.0
    for x in arguments["X"] if "X" in arguments else arguments["params"]:
        batch, n, m = sides(x)
        total += batch * sum(4.0 * n * n * m + (2.0 * n**3 if c else 0.0) for c in squares)
    return total


def gram(arguments: Arguments) -> float:
    """Return the FLOPs of a full product, X X^T or B X."""
    X: Tensor = arguments["X"]
    return 2.0 * X.numel() * X.shape[-2]


def update(arguments: Arguments) -> float:
    A: Tensor = arguments["A"]
    return 2.0 * A.numel() * A.shape[-1]


def gram_polynomial(arguments: Arguments) -> float:
    """Return the FLOPs of R^2 per step, Q Z but in the first, and R Z and Z W but in the last."""
    R: Tensor = arguments["R"]
    return 2.0 * R.numel() * R.shape[-1] * (4 * len(arguments["coefficients"]) / 3 - 3)


def direct_polynomial(arguments: Arguments) -> float:
    """Return the FLOPs per step of X X^T, its square, and the product with X."""
    batch, n, m = sides(arguments["X"])
    return batch * 2.0 * n * n * (2 * m + n) * len(arguments["coefficients"]) / 3


def polar_iteration(arguments: Arguments) -> float:
    """Return the FLOPs of all its steps, as of `direct_polynomial`, without the power steps."""
    batch, n, m = sides(arguments["X"])
    steps = sum(STEPS[torch.float64 if arguments["X"].dtype == torch.float64 else torch.float32])
    return batch * 2.0 * n * n * (2 * m + n) * steps


def norm(arguments: Arguments) -> float:
    """Return the FLOPs of two products with a vector per step."""
    return 4.0 * arguments["W"].numel() * float(arguments.get("steps", 32))


def gram_iteration(arguments: Arguments) -> float:
    batch, n, m = sides(arguments["W"])
    return batch * 2.0 * n * n * (m + (arguments.get("steps", 5) - 1) * n)


def basis(arguments: Arguments) -> float:
    """Return the FLOPs of a product with the basis, 2 m n k."""
    Q: Tensor = arguments["Q"]
    return 2.0 * next(iter(arguments.values())).numel() * Q.shape[-1]


def rotation(arguments: Arguments) -> float:
    """Return the FLOPs of two products with the basis, 4 m n k."""
    return sum(4.0 * w.numel() * min(w.shape[-2:]) for w in arguments["params"])
