"""Public K1 functions: polar factors and odd matrix polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks as check
from .coefficients import ROUNDOFF, check_safe, default_restarts, resolve
from .ops.newton_schulz import FORMS, PRECISIONS, SCALES, newton_schulz


class Polynomial(NamedTuple):
    """A polynomial as `ops.newton_schulz` takes it."""

    coefficients: list[float]
    restarts: list[int]
    scale: str
    safety: float


def polynomial(
    coefficients: Any,
    steps: int | None = None,
    *,
    method: str = "auto",
    restarts: Any = "auto",
    precision: str = "auto",
    device: torch.device | None = None,
) -> Polynomial:
    """Resolve coefficients and restarts; ValueError for combinations known to blow up."""
    check.choice("polar", "method", method, FORMS)
    check.choice("polar", "precision", precision, PRECISIONS)
    if isinstance(coefficients, list):
        coefficients = tuple(tuple(t) if isinstance(t, list) else t for t in coefficients)
    if isinstance(restarts, (list, tuple)):
        restarts = tuple(restarts)
    elif restarts != "auto":
        raise TypeError(f"polar: restarts must be 'auto' or a list of iterations, got {restarts!r}")
    half = precision == "auto" and device is not None and device.type != "cpu"
    dtype = precision if precision in ROUNDOFF else "float16" if half else "float32"
    return _polynomial(coefficients, steps, method, restarts, dtype)


@lru_cache(maxsize=256)
def _polynomial(
    coefficients: Any, steps: int | None, method: str, restarts: Any, dtype: str
) -> Polynomial:
    c = resolve(coefficients, steps)
    check_safe(c, dtype=dtype, form="direct", restarts=())
    if method == "gram" or (method == "auto" and dtype != "bfloat16"):
        restarts = default_restarts(c, dtype) if restarts == "auto" else restarts
        check_safe(c, dtype=dtype, form="gram", restarts=restarts)
    elif restarts == "auto":
        restarts = ()
    flat = [x for triple in c.steps(steps) for x in triple]
    return Polynomial(flat, list(restarts), c.prescale, c.safety)


@overload
def polar(X: Tensor, coefficients: Any = ..., **options: Any) -> Tensor: ...
@overload
def polar(X: Sequence[Tensor], coefficients: Any = ..., **options: Any) -> list[Tensor]: ...


def polar(
    X: Tensor | Sequence[Tensor],
    coefficients: Any = "polar_express",
    *,
    steps: int | None = None,
    method: str = "auto",
    restarts: Any = "auto",
    precision: str = "auto",
    scale: str | None = None,
    eps: float = 0.0,
) -> Tensor | list[Tensor]:
    """U V^T for X = U S V^T, approximately: Newton-Schulz on X / max(|X|_F, eps).

    Each singular value sigma of the scaled X becomes f(sigma), f the composed odd polynomial, whose
    band `coefficients.image` tells; the error against U V^T is that of the band, not of the dtype.

    Args:
        X: a (batch of) matrices (..., m, n) or a list of them, any shapes; float32, float64,
            bfloat16 or float16. Not modified.
        coefficients: a name of `coefficients.COEFFICIENTS`, one (a, b, c), or a list of triples.
        steps: iterations (None: what the source runs).
        method: "direct" iterates on X, "gram" on the small Gram matrix, "auto" takes the cheaper
            one that is safe in its dtype.
        restarts: iterations before which the Gram form starts anew from X; "auto" is the fewest
            that keep it safe (`coefficients.default_restarts`).
        precision: dtype of the iterates: "float32", "float64", "bfloat16", "float16"; "full" keeps
            float32 and float64 inputs as they are; "auto" is the most accurate that is no slower
            than bfloat16 in direct form (CPU: float32 or bfloat16, GPU: float16).
            "exact" calls `polar_exact` and returns its factor.
        scale: "frobenius", "schatten4" (tighter: |X X^T|_F^(1/2)), "aol" (rows; a different factor)
            or "none"; None is what the coefficients were made for.
        eps: lower clamp of |X|_F. 0 makes polar(2^k X) == polar(X) bit for bit.

    Returns: the factor(s), contiguous, in the dtype of X. Zero in, zero out; a non-finite entry
    stays inside its own matrix of the batch.

    Raises: ValueError or TypeError for unknown names and for combinations of coefficients, dtype and
    restarts that are known to blow up; the message names a safe one.

    Source: arXiv:2502.16982, arXiv:2505.16932, Gram form: github.com/Dao-AILab/gram-newton-schulz.
    """
    single = isinstance(X, Tensor)
    matrices = [X] if isinstance(X, Tensor) else list(X)
    check.tensors("polar", "X", matrices, min_dim=2)
    if precision == "exact":
        from .exact import polar_exact

        factors = [polar_exact(x).factor for x in matrices]
        return factors[0] if single else factors
    if scale is not None:
        check.choice("polar", "scale", scale, SCALES)
    device = matrices[0].device if matrices else None
    p = polynomial(
        coefficients, steps, method=method, restarts=restarts, precision=precision, device=device
    )
    out = newton_schulz(
        matrices, p.coefficients, p.restarts, method, precision, scale or p.scale, eps, p.safety
    )
    return out[0] if single else out


def odd_polynomial(
    X: Tensor, coefficients: Sequence[Sequence[float]], *, precision: str = "full"
) -> Tensor:
    """U f(S) V^T with f = f_T o ... o f_1, f_t(x) = a x + b x^3 + c x^5: no scaling, no safety net.

    For caps and other spectral maps whose input is already in range; any signs, c = 0 allowed.

    Args:
        X: a (batch of) matrices (..., m, n), not modified.
        coefficients: (a, b, c) per iteration.
        precision: dtype of the iterates, as `polar`; "full" keeps float32 and float64.

    Returns: the mapped matrices, contiguous, in the dtype of X.
    """
    name = "odd_polynomial"
    check.tensor(name, "X", X, min_dim=2)
    check.choice(name, "precision", precision, PRECISIONS)
    flat: list[float] = []
    for triple in coefficients:
        if len(triple) != 3:
            raise ValueError(f"{name}: coefficients must be triples (a, b, c), got {triple!r}")
        flat += [float(x) for x in triple]
    return newton_schulz([X], flat, [], "direct", precision, "none")[0]
