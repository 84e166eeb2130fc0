"""The work of a case's arguments in FLOPs, by what is computed."""

from __future__ import annotations

import math

from torch import Tensor

from .inputs import Arguments


def sides(t: Tensor) -> tuple[int, int, int]:
    """Matrices in the batch, short side, long side."""
    n, m = sorted(t.shape[-2:])
    return math.prod(t.shape[:-2]), n, m


def polynomial(arguments: Arguments) -> float:
    """Nominal: the direct form, T (4 n^2 m + 2 n^3), or T 4 n^2 m where c = 0."""
    squares = arguments["coefficients"][2::3]
    total = 0.0
    for x in arguments["X"] if "X" in arguments else arguments["params"]:
        batch, n, m = sides(x)
        total += batch * sum(4.0 * n * n * m + (2.0 * n**3 if c else 0.0) for c in squares)
    return total


def gram(arguments: Arguments) -> float:
    """Full products: X X^T or B X."""
    X: Tensor = arguments["X"]
    return 2.0 * X.numel() * X.shape[-2]


def update(arguments: Arguments) -> float:
    A: Tensor = arguments["A"]
    return 2.0 * A.numel() * A.shape[-1]


def gram_polynomial(arguments: Arguments) -> float:
    """R^2, and all but the first time Q Z, and all but the last R Z and Z W."""
    R: Tensor = arguments["R"]
    return 2.0 * R.numel() * R.shape[-1] * (4 * len(arguments["coefficients"]) / 3 - 3)


def direct_polynomial(arguments: Arguments) -> float:
    """X X^T, its square, and the product with X."""
    batch, n, m = sides(arguments["X"])
    return batch * 2.0 * n * n * (2 * m + n) * len(arguments["coefficients"]) / 3


def norm(arguments: Arguments) -> float:
    """Two products with a vector per step."""
    return 4.0 * arguments["W"].numel() * float(arguments.get("steps", 32))


def gram_iteration(arguments: Arguments) -> float:
    batch, n, m = sides(arguments["W"])
    return batch * 2.0 * n * n * (m + (arguments.get("steps", 5) - 1) * n)


def basis(arguments: Arguments) -> float:
    """One product with the basis, 2 m n k."""
    Q: Tensor = arguments["Q"]
    return 2.0 * next(iter(arguments.values())).numel() * Q.shape[-1]


def rotation(arguments: Arguments) -> float:
    """Two products with the basis, 4 m n k."""
    return sum(4.0 * w.numel() * min(w.shape[-2:]) for w in arguments["params"])
