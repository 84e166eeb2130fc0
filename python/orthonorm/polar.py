"""Public K1 functions: polar factors and odd matrix polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from . import _checks as check
from ._library import without_gradient
from .coefficients import ROUNDOFF, Coefficients, check_safe, default_restarts, resolve
from .exact import polar_exact
from .ops.newton_schulz import FORMS, PRECISIONS, SCALES, newton_schulz
from .ops.words import check_coefficients

Matrices = TypeVar("Matrices", Tensor, list[Tensor])


class Polynomial(NamedTuple):
    """Arguments of `ops.newton_schulz` that describe a polynomial."""

    coefficients: list[float]
    restarts: list[int]
    scale: str
    safety: float
    precision: str  # "auto" only if every dtype that it may choose is safe


def polynomial(
    coefficients: Any,
    steps: int | None = None,
    *,
    method: str = "auto",
    restarts: Any = "auto",
    precision: str = "auto",
    device: torch.device | None = None,
    name: str = "polar",
) -> Polynomial:
    """Resolve coefficients and restarts; raise ValueError for combinations known to blow up.

    `name` stands in error messages.
    """
    check.choice(name, "method", method, FORMS)
    check.choice(name, "precision", precision, PRECISIONS)
    coefficients = _frozen(coefficients)
    if not isinstance(coefficients, (str, tuple, Coefficients)):
        resolve(coefficients)  # raises
    if isinstance(restarts, (list, tuple)):
        for r in restarts:
            check.integer(name, "restarts", r, 1)
        restarts = tuple(restarts)
    elif restarts != "auto":
        raise TypeError(
            f"{name}: restarts must be 'auto' or a list of iterations, got {restarts!r}"
        )
    on_gpu = device is not None and device.type != "cpu"
    return _polynomial(coefficients, steps, method, restarts, precision, on_gpu)


def _polynomial(
    coefficients: Any, steps: int | None, method: str, restarts: Any, precision: str, on_gpu: bool
) -> Polynomial:
    """Call `_resolved`; torch.compile treats the result as a constant."""
    return _resolved(coefficients, steps, method, restarts, precision, on_gpu)


# The mark of torch.compiler.assume_constant_result: torch.compile calls the function while tracing
# and keeps the result. The decorator itself would import the whole of torch._dynamo.
_polynomial._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256, typed=True)  # typed, because steps=True must not meet the entry of steps=1
def _resolved(
    coefficients: Any, steps: int | None, method: str, restarts: Any, precision: str, on_gpu: bool
) -> Polynomial:
    """Resolve and check the arguments of `polynomial`."""
    c = resolve(coefficients, steps)
    half = precision == "auto" and on_gpu
    dtype = precision if precision in ROUNDOFF else "float16" if half else "float32"
    check_safe(c, dtype=dtype, form="direct", restarts=())
    # On CPUs method "auto" may use the Gram form for bfloat16; its chain iterates in float32.
    chain = "float32" if (dtype, method, on_gpu) == ("bfloat16", "auto", False) else dtype
    if method == "gram" or (method == "auto" and chain != "bfloat16"):
        restarts = default_restarts(c, chain) if restarts == "auto" else restarts
        check_safe(c, dtype=chain, form="gram", restarts=restarts)
    elif restarts == "auto":
        restarts = ()
    if precision == "auto" and not on_gpu and not _holds_in_bfloat16(c):
        precision = "full"
    flat = [x for triple in c.steps() for x in triple]
    return Polynomial(flat, list(restarts), c.prescale, c.safety, precision)


def _frozen(value: Any) -> Any:
    """Return sequences as tuples, also nested ones, so that the value can be a cache key."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(_frozen(v) for v in value)
    return value


def _holds_in_bfloat16(c: Coefficients) -> bool:
    """True if precision "auto" may choose bfloat16, a dtype for large matrices on CPUs."""
    try:
        check_safe(c, dtype="bfloat16", form="direct")
    except ValueError:
        return False
    return True


def polar(
    X: Matrices,
    coefficients: Any = "polar_express",
    *,
    steps: int | None = None,
    method: str = "auto",
    restarts: Any = "auto",
    precision: str = "auto",
    scale: str | None = None,
    eps: float = 0.0,
) -> Matrices:
    """U V^T for X = U S V^T, approximately: Newton-Schulz on X / max(|X|_F, eps).

    Each singular value sigma of the scaled X becomes f(sigma), f the composed odd polynomial. The
    band of f (`coefficients.image`) determines the error against U V^T, not the dtype.

    Args:
        X: a (batch of) matrices (..., m, n) or a list of them, any shapes; float32, float64,
            bfloat16 or float16. Not modified.
        coefficients: a name of `coefficients.COEFFICIENTS`, one (a, b, c), or a list of triples.
        steps: iterations (None: what the source runs).
        method: "direct" iterates on X, "gram" on the small Gram matrix; "auto" takes the cheaper
            one that is safe in its dtype.
        restarts: iterations before which the Gram form starts anew from X; "auto" takes the fewest
            that keep it safe (`coefficients.default_restarts`).
        precision: dtype of the iterates.
            "float32", "float64", "bfloat16" and "float16" name it. "full" keeps float32 and float64
            inputs as they are. "auto" is the most accurate that is no slower than the function of
            `torch.optim.Muon`: on GPUs float16; on CPUs float32, or bfloat16 if float32 is slower
            and these coefficients allow it. "exact" returns the factor of `polar_exact`, whatever
            the coefficients.
            On ill-conditioned matrices float16 in Gram form may have twice the error of bfloat16
            in direct form. method="gram" refuses bfloat16. method="auto" may use the Gram form for
            bfloat16 on CPUs: its chain is float32 and its error that of bfloat16 in direct form.
        scale: "frobenius", "schatten4" (tighter: |X X^T|_F^(1/2)), "aol" (rows; a different factor)
            or "none"; None takes the one that the coefficients were made for.
        eps: lower clamp of the norm (for "aol" of each row's); 0 makes polar(2^k X) == polar(X) bit
            for bit.

    Returns: the factor(s), contiguous, in the dtype of X. Zero gives zero. A non-finite entry
    affects only its own matrix of the batch. There is no gradient: backward raises
    NotImplementedError (compiled calls only warn).

    Raises: ValueError or TypeError for unknown names, and for combinations of coefficients, dtype
    and restarts that are known to blow up; the message names a safe one.

    Source: arXiv:2502.16982, arXiv:2505.16932, Gram form: github.com/Dao-AILab/gram-newton-schulz.
    """
    single = isinstance(X, Tensor)
    if not isinstance(X, (Tensor, list, tuple)):
        raise TypeError(f"polar: X must be a Tensor or a list of them, got {type(X).__name__}")
    matrices = [X] if isinstance(X, Tensor) else list(X)
    check.tensors("polar", "X", matrices, min_dim=2)
    check.choice("polar", "precision", precision, (*PRECISIONS, "exact"))
    if precision == "exact":
        _left_alone(steps=(steps, None), method=(method, "auto"), restarts=(restarts, "auto"),
                    scale=(scale, None), eps=(eps, 0.0))  # fmt: skip
        factors = [polar_exact(x).factor for x in matrices]
        return cast(Matrices, factors[0] if single else factors)
    if scale is not None:
        check.choice("polar", "scale", scale, SCALES)
    check.number("polar", "eps", eps, 0.0)
    device = matrices[0].device if matrices else None
    p = polynomial(
        coefficients, steps, method=method, restarts=restarts, precision=precision, device=device
    )
    how = (p.coefficients, p.restarts, method, p.precision, scale or p.scale, eps, p.safety)
    out = without_gradient("polar", lambda: newton_schulz(matrices, *how), matrices)
    return cast(Matrices, out[0] if single else out)


def _left_alone(**options: tuple[Any, Any]) -> None:
    """Raise ValueError if an option, given as (value, default), differs from its default.

    precision="exact" has no use for these options.
    """
    for name, (value, default) in options.items():
        if value != default:
            raise ValueError(
                f"polar: {name} must stay {default!r} with precision='exact', got {value!r}"
            )


def odd_polynomial(
    X: Tensor, coefficients: Sequence[Sequence[float]], *, precision: str = "full"
) -> Tensor:
    """U f(S) V^T with f = f_T o ... o f_1, f_t(x) = a x + b x^3 + c x^5: no scaling, no safety net.

    For caps and other spectral maps whose input is already in range. Coefficients may have any
    signs, and c may be 0.

    Args:
        X: a (batch of) matrices (..., m, n), not modified.
        coefficients: (a, b, c) per iteration.
        precision: dtype of the iterates, as `polar`; "full" keeps float32 and float64.

    Returns: the mapped matrices, contiguous, in the dtype of X. They have no gradient: backward
    raises NotImplementedError (compiled calls warn only).
    """
    name = "odd_polynomial"
    check.tensor(name, "X", X, min_dim=2)
    check.choice(name, "precision", precision, PRECISIONS)
    if not isinstance(coefficients, (list, tuple)):
        raise TypeError(f"{name}: coefficients must be a list of triples, got {coefficients!r}")
    flat: list[float] = []
    for triple in coefficients:
        if not isinstance(triple, (list, tuple)) or len(triple) != 3:
            raise ValueError(f"{name}: coefficients must be triples (a, b, c), got {triple!r}")
        flat += triple
    check_coefficients(name, flat)
    how: tuple[Any, ...] = ([float(x) for x in flat], [], "direct", precision, "none")
    return without_gradient(name, lambda: newton_schulz([X], *how), [X])[0]
