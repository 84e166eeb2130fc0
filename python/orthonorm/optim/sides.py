"""Two-sided preconditioners: averages of G G^T and G^T G, their eigenvectors and roots.

Each matrix has a left (m x m) and a right (n x n) tensor of every kind. A side longer than
`max_precond_dim` is left out: its tensors are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import apply, gram, gram_update_, magnitude
from .stacks import beside, in_place, stacked
from .state import Batch, Updates

SIDES = ("left", "right")


def side_shapes(x: Tensor, group: dict[str, Any], *kinds: str) -> dict[str, tuple[int, ...]]:
    """Return state names {side}_{kind} and shapes for both sides of one matrix."""
    shapes: dict[str, tuple[int, ...]] = {}
    for side, d in zip(SIDES, x.shape[-2:], strict=True):
        k = d if d <= group["max_precond_dim"] else 0
        shapes |= {f"{side}_{kind}": (*x.shape[:-2], k, k) for kind in kinds}
    return shapes


def side_grams(grams: Sequence[Tensor], G: Tensor) -> list[Tensor]:
    """Return G G^T and G^T G in the dtypes of `grams`; of a side left out, its empty tensor."""
    pairs = zip(grams, (G, G.mT), strict=True)
    return [gram.unchecked(X.to(A.dtype)) if A.numel() else A for A, X in pairs]


def averaged(
    grams: Sequence[Tensor], new: Sequence[Tensor], beta: float, weights: Sequence[float]
) -> list[Tensor]:
    """Return beta L + weight G G^T and beta R + weight G^T G; a side left out stays empty."""
    return [
        beta * A + weight * B if A.numel() else A
        for A, B, weight in zip(grams, new, weights, strict=True)
    ]


def averaged_with(
    grams: Sequence[Tensor], G: Tensor, beta: float, weights: Sequence[float]
) -> list[Tensor]:
    """Return `averaged` of `side_grams`; the Gram matrices of G are added to copies of averages."""
    found = [A.clone() for A in grams]
    for A, X, weight in zip(found, (G, G.mT), weights, strict=True):
        if A.numel():
            gram_update_.unchecked(A, X.to(A.dtype), weight, beta)
    return found


def average_(batch: Batch, indices: list[int], beta: float, weight: float) -> None:
    """L <- beta L + weight G G^T, R <- beta R + weight G^T G, for matrices of one shape."""
    G = stacked([batch.grads[i] for i in indices])
    for side, X in zip(SIDES, (G, G.mT), strict=True):
        with in_place([batch.state[f"{side}_gram"][i] for i in indices]) as A:
            if A.numel():
                gram_update_.unchecked(A, X.to(A.dtype), weight, beta)


def bases_beside(updates: Updates, bases: list[Tensor]) -> list[Tensor]:
    """Return bases stacked as the updates are, and rounded to their dtype: products stay in it."""
    pairs = zip(updates.stacks, beside(updates, bases), strict=True)
    return [q.to(u.dtype) for u, q in pairs]


def between(left: Tensor, X: Tensor, right: Tensor) -> Tensor:
    """Return left X right, without empty sides.

    X right comes first: each of its rows depends on one row of X.
    """
    X = apply.unchecked(X.mT, right.mT, 0.0).mT if right.numel() else X
    return apply.unchecked(X, left, 0.0) if left.numel() else X


def eigenvectors(A: Tensor) -> Tensor:
    """Return eigenvectors of a Gram matrix by descending eigenvalue, in float64.

    They are NaN where A is not finite.
    """
    A64, unknown = finite(A)
    return torch.linalg.eigh(A64).eigenvectors.flip(-1) + unknown


def inverse_root(A: Tensor, power: float, eps: float, ridge: float) -> Tensor:
    """Return Q diag(1 / (|lambda|^power + eps)) Q^T, A + ridge I = Q diag(lambda) Q^T, float64.

    Without eps and ridge it is the pseudo-inverse: 0 where lambda is a rounding error of A.
    """
    A64, unknown = finite(A)
    values, Q = torch.linalg.eigh(A64)
    divisors = (values + ridge).abs() ** power + eps
    if eps == ridge == 0:
        least = A.shape[-1] * torch.finfo(A.dtype).eps * values.abs().amax(-1, keepdim=True)
        divisors = torch.where(values > least, divisors, torch.inf)
    return (Q / (divisors.unsqueeze(-2) + unknown)) @ Q.mT


def finite(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, unknown): B is A in float64, the identity where A is not finite.

    `unknown` is NaN for those matrices, else 0; added to a result, it marks them.
    """
    fine = magnitude.unchecked([A]).isfinite().view(*A.shape[:-2], 1, 1)
    identity = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device)
    return torch.where(fine, A.double(), identity), torch.where(fine, 0.0, torch.nan).double()
