"""The polar factor to working precision, by products alone: batched, no SVD.

Newton-Schulz in direct form, in two stages. The first steps ("lifts") multiply small singular
values by 3.4445 and never push a large one below 0.68. Relative sizes survive, so the process is
backward stable; steps tuned for speed map sigma_1 to the bottom of their band and lose digits. Then
the convergent quintic (15/8, -10/8, 3/8) ("polishes") cubes the error at each step.

Both use E = I - A: a x + b x^3 + c x^5 = x ((a+b+c) - (b+2c) e + c e^2), e = 1 - x^2. Near
sigma = 1 no large terms cancel, which halves both errors (2026-11, n = 1 to 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from ._library import without_gradient
from .ops.normalize import accumulator
from .ops.scaling import scaled
from .ops.spectral import gram_iteration, start_vector
from .ops.words import apply, gram, symmetric_update

# sigma -> [0.68, 1.13] from below, kellerjordan.github.io/posts/muon
LIFT = (3.4445, -4.7750, 2.0315)
POLISH = (1.875, -1.25, 0.375)
OWN_ROUNDING = 16  # eps allowed in addition to max(m, n) eps, for the iterations' own rounding
# (lifts, polishes); the lifts suffice for singular values down to eps sigma_1
STEPS = {torch.float32: (15, 4), torch.float64: (31, 5)}
# Range of sigma^2 that is above rounding and has one preimage under a lift; a lift from below 0.043
# ends below 0.46.
RESOLVED = (0.01, 0.46)


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
    wide = m <= n
    A = (X if wide else X.mT).to(dtype)
    Y = scaled(A, "frobenius", 0.0, 1.0, dtype, None)
    Q, smallest = _iterate(Y, *(STEPS[dtype] if min(m, n) > 1 else (0, 1)))
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
    Q = Q if wide else Q.mT
    return PolarExact(Q.to(X.dtype).contiguous(), orthogonality, residual, rcond, info)


def _norm(E: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix."""
    return torch.linalg.vector_norm(E, dim=(-2, -1))


def _iterate(Y: Tensor, lifts: int, polishes: int) -> tuple[Tensor, Tensor]:
    """Return the factor of a wide batch with |Y|_F = 1, and an estimate of the smallest sigma.

    At every lift the smallest eigenvalue of the Gram matrix is estimated from above. If it lies in
    RESOLVED it has one preimage under the lifts before, and is carried back through them.
    """
    z = start_vector(Y.mT)
    identity = torch.eye(Y.shape[-2], dtype=Y.dtype, device=Y.device)
    seen: list[Tensor] = []
    for k in range(lifts + polishes):
        A = gram(Y)
        if k <= lifts:
            value, z = _smallest_eigenvalue(A, z)
            readable = (value > RESOLVED[0]) & (value < RESOLVED[1] if k else True)
            seen.append(torch.where(readable, value.clamp(min=0).sqrt(), torch.inf))
        a, b, c = LIFT if k < lifts else POLISH
        E = identity - A
        Y = apply(Y, symmetric_update(E, E, E, c, -(b + 2 * c)), a + b + c)
    smallest = seen.pop()
    for earlier in reversed(seen):
        smallest = torch.minimum(_before_lift(smallest), earlier)
    return Y, smallest.nan_to_num(posinf=0.0)


def _smallest_eigenvalue(A: Tensor, z: Tensor, steps: int = 8) -> tuple[Tensor, Tensor]:
    """Return the Rayleigh quotient of A, and the vector, after power steps on 1.3 I - A.

    The spectrum of 1.3 I - A lies in [0, 1.3].
    """
    for _ in range(steps):
        z = 1.3 * z - (A @ z.unsqueeze(-1)).squeeze(-1)
        z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=1e-30)
    return (z * (A @ z.unsqueeze(-1)).squeeze(-1)).sum(-1), z


def _before_lift(y: Tensor) -> Tensor:
    """Return x with a x + b x^3 + c x^5 = y on the rising branch, by Newton's method."""
    a, b, c = LIFT
    x = y / a
    for _ in range(2):  # the start is at most 6 % too small; two steps reach 1e-7
        s = x * x
        x = x - (x * (a + s * (b + s * c)) - y) / (a + s * (3 * b + s * 5 * c))
    return torch.where(y.isinf(), y, x)
