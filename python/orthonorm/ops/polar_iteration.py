"""The iteration of `polar_exact`: a polar factor to working precision, by products alone.

Newton-Schulz in direct form, in two stages. The first steps ("lifts") multiply small singular
values by 3.4445 and never push a large one below 0.68. Relative sizes survive, so the process is
backward stable; steps tuned for speed map sigma_1 to the bottom of their band and lose digits. Then
the convergent quintic (15/8, -10/8, 3/8) ("polishes") cubes the error at each step.

Both use E = I - A: a x + b x^3 + c x^5 = x ((a+b+c) - (b+2c) e + c e^2), e = 1 - x^2. Near
sigma = 1 no large terms cancel, which halves both errors (2026-11, n = 1 to 128).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .._polynomials import CUBING, KELLER
from .normalize import accumulator
from .scaling import scaled
from .spectral import start_vector
from .words import apply, gram, symmetric_update

# a lift takes sigma to [0.68, 1.13] from below
LIFT, POLISH = KELLER, CUBING
# (lifts, polishes); the lifts suffice for singular values down to eps sigma_1
STEPS = {torch.float32: (15, 4), torch.float64: (31, 5)}
# Range of sigma^2 that is above rounding and has one preimage under a lift; a lift from below 0.043
# ends below 0.46.
RESOLVED = (0.01, 0.46)


@op("polar_iteration(Tensor X) -> (Tensor, Tensor)", composite=True)
def polar_iteration(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q = U V^T of X = U S V^T, and an upper estimate of sigma_min / |X|_F.

    At every lift the smallest eigenvalue of the Gram matrix is estimated from above. If it lies in
    RESOLVED it has one preimage under the lifts before, and is carried back through them. The
    estimate is 0 if no lift resolves it. Directions below eps sigma_1 are inaccurate, and a zero
    matrix gives zeros.

    Shapes: X and Q are (..., m, n), the estimate (...). Results and arithmetic are float64 if X is,
    else float32.
    """
    dtype, (m, n) = accumulator(X), X.shape[-2:]
    if X.numel() == 0:
        return X.to(dtype, copy=True), torch.zeros(X.shape[:-2], dtype=dtype, device=X.device)
    A = (X if m <= n else X.mT).to(dtype)
    Y = scaled(A, "frobenius", 0.0, 1.0, dtype, None)
    Q, smallest = _iterate(Y, *(STEPS[dtype] if min(m, n) > 1 else (0, 1)))
    return (Q if m <= n else Q.mT).contiguous(), smallest


@polar_iteration.check
def _(X: Tensor) -> None:
    check.tensor("polar_iteration", "X", X, min_dim=2)


@polar_iteration.fake
def _(X: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulator(X)
    return X.new_empty(X.shape, dtype=dtype), X.new_empty(X.shape[:-2], dtype=dtype)


def _iterate(Y: Tensor, lifts: int, polishes: int) -> tuple[Tensor, Tensor]:
    """Return the factor of a wide batch with |Y|_F = 1, and the estimate of sigma_min."""
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


def _smallest_eigenvalue(A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Rayleigh quotient of A, and the vector, after 8 power steps on 1.3 I - A.

    The spectrum of 1.3 I - A lies in [0, 1.3].
    """
    for _ in range(8):
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
