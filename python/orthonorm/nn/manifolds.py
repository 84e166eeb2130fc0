"""Parameters with orthonormal columns: tangents, the polar retraction, Grassmann classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._polynomials import CUBING
from ..exact import polar_exact
from ..polar import polar


def grassmann_tangent(S: Tensor, D: Tensor) -> Tensor:
    """D - S (S^T D): the part of D that moves the span of S.

    Shapes: S with orthonormal columns and D are (..., d, k). Cost: 4 d k^2 operations.
    Source: arXiv:physics/9806030.
    """
    _pair("grassmann_tangent", S, "D", D)
    return D - S @ (S.mT @ D)


def stiefel_tangent(S: Tensor, D: Tensor) -> Tensor:
    """D - S (S^T D + D^T S) / 2: the part of D that keeps the columns of S orthonormal.

    Shapes: S with orthonormal columns and D are (..., d, k). Cost: 4 d k^2 operations.
    Source: arXiv:physics/9806030.
    """
    _pair("stiefel_tangent", S, "D", D)
    A = S.mT @ D
    return D - S @ (0.5 * (A + A.mT))


@torch.no_grad()
def polar_retraction(S: Tensor, T: Tensor, step: float = 1.0, steps: int | None = None) -> Tensor:
    """msign(S - step T): the nearest matrices with orthonormal columns, for a whole batch.

    Takes the place of geodesics (by SVD) and of re-orthonormalization (by QR). It agrees with the
    geodesic to second order in the step. For a tangent T the singular values of S - step T are
    sqrt(1 + step^2 sigma(T)^2).

    Args:
        S: (..., d, k), orthonormal columns, d >= k.
        T: the direction to move against, such as a gradient, (..., d, k).
        step: factor of T, such as a learning rate.
        steps: None takes `polar_exact`; else the number of quintic Newton-Schulz steps, without
            scaling. Each cubes the distance to orthonormality: 2 for step |T| up to 0.3, 3 up to 1.

    Returns: (..., d, k). Cost: 4 d k^2 + 2 k^3 operations per step; `polar_exact` takes 19 steps
    in float32.

    Source: arXiv:2308.01547 (Grassmann classes), arXiv:2205.14173 (StiefelAdam's last step).
    """
    op = "polar_retraction"
    _pair(op, S, "T", T)
    check.number(op, "step", step)
    if S.shape[-2] < S.shape[-1]:
        raise ValueError(f"{op}: S must have no more columns than rows, got {check.shape(S)}")
    X = torch.add(S, T, alpha=-step)
    if steps is None:
        return polar_exact(X).factor
    check.integer(op, "steps", steps, 1)
    return polar(X, [CUBING] * steps, scale="none", precision="full", method="direct")


def grassmann_logits(x: Tensor, S: Tensor, gamma: float = 25.0) -> Tensor:
    """gamma |S_c^T x| / |x| for every class c, a subspace spanned by the columns of S_c.

    Differentiable. A step by `polar_retraction` along a `grassmann_tangent` keeps the columns of S
    orthonormal.

    Shapes: x is (..., d), S (classes, d, k), the logits (..., classes). Cost: 2 classes d k
    operations per sample. Source: arXiv:2308.01547.
    """
    check.tensor("grassmann_logits", "S", S, min_dim=3)
    check.tensor("grassmann_logits", "x", x, min_dim=1)
    check.number("grassmann_logits", "gamma", gamma)
    classes, d, k = S.shape
    coordinates = F.normalize(x, dim=-1) @ S.movedim(1, 0).reshape(d, classes * k)
    return gamma * torch.linalg.vector_norm(coordinates.unflatten(-1, (classes, k)), dim=-1)


def _pair(op: str, S: Tensor, name: str, D: Tensor) -> None:
    """Raise TypeError or ValueError unless S and D are matrices (or batches) of one shape."""
    check.tensor(op, "S", S, min_dim=2)
    check.tensor(op, name, D, min_dim=2)
    check.equal_shape(op, name, D, S.shape)
