"""K1, whole polynomials on lists of matrices: scale, iterate, return."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _checks as check
from .. import orthogonalize as k1
from .._library import op
from .scaling import divide_each, magnitude, scaled, split_norms
from .words import (
    HALF,
    MOST,
    SMALL,
    addmm,
    check_coefficients,
    check_restarts,
    direct_polynomial,
    fits,
    gram_form,
    triples_of,
)

FORMS = ("auto", "direct", "gram")
PRECISIONS = ("auto", "full", "float32", "float64", "bfloat16", "float16")
SCALES = ("frobenius", "schatten4", "aol", "none")


@op(
    "small_newton_schulz(Tensor[] X, float[] coefficients, ScalarType dtype, bool scale=True, "
    "float eps=0.0, float safety=1.0, Tensor? norms=None) -> Tensor[]"
)
def small_newton_schulz(
    X: list[Tensor],
    coefficients: list[float],
    dtype: torch.dtype,
    scale: bool = True,
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> list[Tensor]:
    """`newton_schulz` in direct form for small matrices, one core each.

    Small are matrices of at most 128 x 128 entries, and a single row or column of any length. A
    kernel keeps a whole matrix in cache through all iterations. Operands of products are rounded to
    `dtype` (float32, bfloat16, float16 or float64); a kernel may accumulate more precisely.

    Shapes: each X[i] is (..., m, n), the results too, contiguous, in the dtype of X[i].
    """
    out = []
    for x, norm in zip(X, split_norms(X, norms), strict=True):
        y = scaled(x, "frobenius" if scale else "none", eps, safety, dtype, norm)
        wide = x.shape[-2] <= x.shape[-1]
        y = y if wide else y.mT
        for a, b, c in triples_of(coefficients):
            A = y @ y.mT
            B = b * A if c == 0 else addmm(A, A, A, c, b)
            y = addmm(y, B, y, 1.0, a)
        out.append((y if wide else y.mT).to(x.dtype).contiguous())
    return out


@small_newton_schulz.serves_part(
    "products in float16 or bfloat16, sides up to 128, matrices not in float64"
)
def _(
    X: list[Tensor],
    coefficients: list[float],
    dtype: torch.dtype,
    scale: bool = True,
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> bool:
    known = norms is None or norms.device == X[0].device
    half = dtype in HALF and all(x.dtype != torch.float64 for x in X)
    square = all(max(x.shape[-2:]) <= SMALL for x in X)
    return bool(X) and half and square and known and len(coefficients) <= MOST


@op(
    "scaled_polynomial_(Tensor(a!) X, Tensor divisors, float[] coefficients, int[] restarts, "
    "bool gram, ScalarType dtype, Tensor? source=None) -> ()",
    composite=True,
)
def scaled_polynomial_(
    X: Tensor,
    divisors: Tensor,
    coefficients: list[float],
    restarts: list[int],
    gram: bool,
    dtype: torch.dtype,
    source: Tensor | None = None,
) -> None:
    """X <- the polynomial of X / divisor, of each matrix of a batch in place, or of `source`.

    It is `divide_each`, then `gram_form` or `direct_polynomial`, in `dtype`. A kernel keeps the
    intermediate results in memory of its own: new memory costs a CPU more than the passes over it.

    Shapes: X is (..., m, n), and source in the dtype of X; divisors (batch,), float64, 0 for
    matrices of zeros.
    """
    y = divide_each(X if source is None else source, divisors, dtype)
    y = gram_form(y, coefficients, restarts) if gram else direct_polynomial(y, coefficients)
    X.copy_(y)


@scaled_polynomial_.check
def _(
    X: Tensor,
    divisors: Tensor,
    coefficients: list[float],
    restarts: list[int],
    gram: bool,
    dtype: torch.dtype,
    source: Tensor | None = None,
) -> None:
    name = "scaled_polynomial_"
    check.tensor(name, "X", X, min_dim=2)
    check.tensor(name, "divisors", divisors)
    check.equal_shape(name, "divisors", divisors, (math.prod(X.shape[:-2]),))
    check.same_device(name, X=[X], divisors=[divisors])
    if source is not None:
        check.same_shapes(name, X=[X], source=[source])
        check.same_dtype(name, X=X, source=source)
    check_coefficients(name, coefficients)
    check_restarts(name, restarts, len(coefficients) // 3)
    check.choice(name, "dtype", dtype, check.FLOATS)


@op(
    'newton_schulz(Tensor[] X, float[] coefficients, int[] restarts, str form="auto", '
    'str precision="auto", str scale="frobenius", float eps=0.0, float safety=1.0, '
    "Tensor? norms=None) -> Tensor[]",
    composite=True,
)
def newton_schulz(
    X: list[Tensor],
    coefficients: list[float],
    restarts: list[int],
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> list[Tensor]:
    """X <- a X + (b A + c A^2) X, A = X X^T, for each (a, b, c), after X <- X / max(|X|_F, eps).

    Args:
        X: (batches of) matrices of any shapes; tall ones iterate on X^T X.
        coefficients: a, b, c of every iteration, flattened.
        restarts: iterations before which the Gram form computes X again, and starts from it.
        form, precision: see `orthogonalize.choose`; results come in the dtype of X.
        scale: "frobenius", "schatten4", "aol" (rows; a different factor) or "none".
        eps: lower clamp of that norm; 0 keeps the result independent of the scale of X.
        safety: the scaled input is divided by it, for coefficients that need sigma_1 < 1.
        norms: |X|_F of every matrix if the caller has it (float64, one per matrix).

    Zero in, zero out. A non-finite entry stays inside its own matrix of the batch.
    """
    return _iterated(X, coefficients, restarts, form, precision, scale, eps, safety, norms, False)


@op(
    'newton_schulz_(Tensor(a!)[] X, float[] coefficients, int[] restarts, str form="auto", '
    'str precision="auto", str scale="frobenius", float eps=0.0, float safety=1.0, '
    "Tensor? norms=None) -> ()",
    composite=True,
)
def newton_schulz_(
    X: list[Tensor],
    coefficients: list[float],
    restarts: list[int],
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> None:
    """X <- `newton_schulz` of X: on a CPU new memory for results costs more than passes over them.

    Arguments and results are those of `newton_schulz`.
    """
    how = (coefficients, restarts, form, precision, scale, eps, safety, norms)
    found = _iterated(X, *how, True)
    if new := [i for i, (x, y) in enumerate(zip(X, found, strict=True)) if x is not y]:
        torch._foreach_copy_([X[i] for i in new], [found[i] for i in new])


def _iterated(
    X: list[Tensor],
    coefficients: list[float],
    restarts: list[int],
    form: str,
    precision: str,
    scale: str,
    eps: float,
    safety: float,
    norms: Tensor | None,
    over: bool,
) -> list[Tensor]:
    """Return the results of `newton_schulz`; with `over`, some may be X itself, overwritten."""
    triples = triples_of(coefficients)
    out: list[Tensor] = list(X)
    small: dict[torch.dtype, list[int]] = {}
    each_norm = split_norms(X, norms)
    for i, x in enumerate(X):
        choice = k1.choose(x, triples, restarts, form, precision)
        if x.numel() == 0:
            out[i] = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif choice.small and scale in ("frobenius", "none"):
            small.setdefault(choice.dtype, []).append(i)
        elif scale == "frobenius" and x.dtype != torch.float64:
            norm = each_norm[i]
            norm = magnitude([x]) if norm is None else norm.reshape(-1)
            source = None if over else x
            out[i] = x if over else torch.empty_like(x, memory_format=torch.contiguous_format)
            divisors = safety * norm.clamp(min=eps)
            gram_too = choice.form == "gram"
            how = (coefficients, restarts, gram_too, choice.dtype, source)
            scaled_polynomial_.overload(out[i], divisors, *how)
        else:
            y = scaled(x, scale, eps, safety, choice.dtype, each_norm[i])
            if choice.form == "gram":
                y = gram_form(y, coefficients, restarts)
            else:
                y = direct_polynomial(y, coefficients)
            out[i] = y.to(x.dtype)
    for dtype, indices in small.items():
        some = None if norms is None else torch.cat([each_norm[i].reshape(-1) for i in indices])  # type: ignore[union-attr]
        matrices = [X[i] for i in indices]
        done = small_newton_schulz.overload(
            matrices, coefficients, dtype, scale != "none", eps, safety, some
        )
        for i, y in zip(indices, done, strict=True):
            out[i] = y
    return out


def _check_polynomial(
    name: str,
    X: list[Tensor],
    coefficients: list[float],
    eps: float,
    safety: float,
    norms: Tensor | None,
) -> None:
    check.tensors(name, "X", X, min_dim=2)
    check.same_device(name, X=X)
    check_coefficients(name, coefficients)
    check.number(name, "eps", eps, 0.0)
    check.number(name, "safety", safety, 1.0)
    if norms is not None:
        check.tensor(name, "norms", norms)
        check.equal_shape(name, "norms", norms, (sum(math.prod(x.shape[:-2]) for x in X),))


@small_newton_schulz.check
def _(
    X: list[Tensor],
    coefficients: list[float],
    dtype: torch.dtype,
    scale: bool = True,
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> None:
    name = "small_newton_schulz"
    _check_polynomial(name, X, coefficients, eps, safety, norms)
    check.choice(name, "dtype", dtype, check.FLOATS)
    for i, x in enumerate(X):
        if not fits(*x.shape[-2:]):
            raise ValueError(
                f"{name}: X[{i}] must have at most {SMALL} x {SMALL} entries or a single row or "
                f"column, got {check.shape(x)}"
            )


def check_iteration(
    name: str,
    X: list[Tensor],
    coefficients: list[float],
    restarts: list[int],
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> None:
    _check_polynomial(name, X, coefficients, eps, safety, norms)
    check.choice(name, "form", form, FORMS)
    check.choice(name, "precision", precision, PRECISIONS)
    check.choice(name, "scale", scale, SCALES)
    check_restarts(name, restarts, len(coefficients) // 3)


newton_schulz.check(functools.partial(check_iteration, newton_schulz.name))
newton_schulz_.check(functools.partial(check_iteration, newton_schulz_.name))
