"""The polar factor to working precision, with a measure of what was reached: batched, no SVD."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from ._library import without_gradient
from .ops.normalize import accumulator
from .ops.polar_iteration import polar_iteration
from .ops.scaling import scaled
from .ops.spectral import gram_iteration
from .ops.words import gram

OWN_ROUNDING = 16  # eps allowed in addition to max(m, n) eps, for the iterations' own rounding


class PolarExact(NamedTuple):
    """Result of `polar_exact`: the factor and, per matrix of the batch, four numbers."""

    factor: Tensor
    orthogonality: Tensor
    residual: Tensor
    rcond: Tensor
    info: Tensor


def polar_exact(X: Tensor) -> PolarExact:
    """Q = U V^T for X = U S V^T, to rounding: |I - Q Q^T|_F, |X - H Q|_F / |X|_F < (n + 16) eps.

    H = sym(X Q^T) is the other polar factor, and n the long side. If rows > columns, read Q^T Q for
    Q Q^T, sym(Q^T X) for H and Q H for H Q. float32 and float64 compute in their own precision,
    half types in float32.

    Args:
        X: a (batch of) matrices (..., m, n), not modified.

    Returns:
        factor: (..., m, n), contiguous, in the dtype of X.
        orthogonality, residual: the two norms above in units of (max(m, n) + 16) eps, before the
            factor is rounded to a half type. Below 1 means success.
        rcond: estimate of sigma_min / sigma_max, an upper bound up to rounding; 0 if info is not 0.
        info: int32. 0: success. 1: numerically rank-deficient; the factor is a partial isometry, or
            inaccurate in directions below eps sigma_1. 2: non-finite input. A matrix of lower rank
            may also give 0, if rounding supplied the missing directions.

    None has a gradient: backward raises NotImplementedError (compiled calls warn only).

    Raises: TypeError if X is not a floating-point tensor, ValueError if it has fewer than two
    dimensions.
    """
    check.tensor("polar_exact", "X", X, min_dim=2)
    return without_gradient("polar_exact", lambda: _polar_exact(X), [X])


def _polar_exact(X: Tensor) -> PolarExact:
    batch, (m, n) = X.shape[:-2], X.shape[-2:]
    dtype = accumulator(X)
    if X.numel() == 0:
        zero = torch.zeros(batch, dtype=dtype, device=X.device)
        return PolarExact(X.clone(), zero, zero, zero, zero.to(torch.int32))
    Q, smallest = polar_iteration(X)
    factor = Q.to(X.dtype)
    Y, Q = (A if m <= n else A.mT for A in (X.to(dtype), Q))
    Y = scaled(Y, "frobenius", 0.0, 1.0, dtype, None)
    unit = (max(m, n) + OWN_ROUNDING) * torch.finfo(dtype).eps
    identity = torch.eye(min(m, n), dtype=dtype, device=X.device)
    orthogonality = _norm(identity - gram(Q)) / unit
    H = Y @ Q.mT
    residual = _norm(Y - 0.5 * (H + H.mT) @ Q) / unit  # |Y|_F = 1
    rcond = smallest / gram_iteration(Y, 6).clamp(min=torch.finfo(dtype).tiny)
    info = torch.where((orthogonality < 1) & (residual < 1), 0, 1).to(torch.int32)
    finite = X.isfinite().flatten(-2).all(-1)
    info = torch.where(finite, info, 2).to(torch.int32)
    rcond = torch.where(info == 0, rcond, 0.0)
    return PolarExact(factor, orthogonality, residual, rcond, info)


def _norm(E: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix."""
    return torch.linalg.vector_norm(E, dim=(-2, -1))
