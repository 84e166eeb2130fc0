"""Norms of matrices, and division by them, without overflow or underflow at any scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .words import gram


def power_of_two(X: Tensor) -> Tensor:
    """Return the power of two at or below the largest absolute entry of each matrix, (..., 1, 1).

    It is 1 if that entry is 0 or not finite. Division by a power of two rounds nothing.
    """
    peak = X.abs().amax((-2, -1), keepdim=True)
    mantissa, _ = torch.frexp(peak)  # in [1/2, 1)
    return torch.where((peak > 0) & peak.isfinite(), peak / (2 * mantissa), 1.0)


def frobenius(X: Tensor) -> Tensor:
    """Return |X|_F of each matrix, float64, shape (..., 1, 1), without overflow or underflow.

    Squares of any float32 fit float64; float64 matrices are divided by `power_of_two` first.
    """
    if X.dtype != torch.float64:
        return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    if X.numel() == 0:
        return X.new_zeros((*X.shape[:-2], 1, 1))
    unit = power_of_two(X)  # `sum` adds pairwise and so more precisely than vector_norm
    return (X / unit).square().sum((-2, -1), keepdim=True).sqrt() * unit


def divide(X: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return X / divisor, rounded once to dtype, 0 where the divisor is 0.

    It is computed in float64, so that powers of two in X and in the divisor cancel exactly.
    """
    return torch.where(divisor == 0, 0.0, X.double() / divisor).to(dtype)


def scaled(
    X: Tensor, scale: str, eps: float, safety: float, dtype: torch.dtype, norm: Tensor | None
) -> Tensor:
    """Scale X to the polynomial's range: X / (safety max(s, eps)), s the norm that `scale` names.

    `norm` is |X|_F if it is known; "none" only divides by `safety`.
    """
    if scale == "none":
        return (X.double() / safety).to(dtype) if safety != 1.0 else X.to(dtype)
    if norm is not None:
        norm = norm.to(torch.float64)
        least = torch.full_like(norm, eps)
    elif X.dtype == torch.float64 and X.numel() > 0:  # |X|_F may be denormal or overflow
        unit = power_of_two(X)
        X, least = X / unit, torch.full_like(unit, eps) / unit
        norm = frobenius(X)
    else:
        norm = frobenius(X)
        least = torch.full_like(norm, eps)
    if scale == "frobenius":
        return divide(X, safety * norm.clamp(min=least), dtype)
    Y = divide(X, norm, dtype)
    if scale == "schatten4":  # |X|_S4 = |X X^T|_F^(1/2) >= sigma_1
        size = frobenius(gram(Y)).sqrt()
    else:  # "aol": rows by (sum_j |X X^T|_ij)^(1/2); changes the polar factor
        size = gram(Y).double().abs().sum(-1, keepdim=True).sqrt()
    least = torch.where(norm == 0, 0.0, least / norm)
    return divide(Y, safety * size.clamp(min=least), dtype)


def norms_of(X: list[Tensor]) -> Tensor:
    parts = [frobenius(x).reshape(-1) for x in X]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


@op("magnitude(Tensor[] X) -> Tensor")
def magnitude(X: list[Tensor]) -> Tensor:
    """|X|_F of every matrix of the list, float64: finite if and only if every entry is.

    There is no overflow or underflow for finite entries whose norm float64 can hold.

    Shapes: X[i] is (..., m, n); the result is 1-D, batches flattened in list order.
    """
    return norms_of(X)


@magnitude.check
def _(X: list[Tensor]) -> None:
    check.tensors("magnitude", "X", X, min_dim=2)
    check.same_device("magnitude", X=X)


@op("inner(Tensor[] X, Tensor[] Y) -> Tensor")
def inner(X: list[Tensor], Y: list[Tensor]) -> Tensor:
    """<X, Y> = sum_ij X_ij Y_ij of every pair of matrices of the lists, in float64.

    Products of float32 are exact and cannot overflow; those of float64 can.

    Shapes: X[i] and Y[i] agree, (..., m, n); the result is 1-D, batches flattened in list order.
    """
    pairs = zip(X, Y, strict=True)
    sums = [(x.double() * y.double()).sum((-2, -1)).reshape(-1) for x, y in pairs]
    return torch.cat(sums) if sums else torch.empty(0, dtype=torch.float64)


@inner.check
def _(X: list[Tensor], Y: list[Tensor]) -> None:
    check.tensors("inner", "X", X, min_dim=2)
    check.tensors("inner", "Y", Y, min_dim=2)
    check.same_shapes("inner", X=X, Y=Y)


@op("divide_each(Tensor X, Tensor divisors, ScalarType dtype) -> Tensor")
def divide_each(X: Tensor, divisors: Tensor, dtype: torch.dtype) -> Tensor:
    """X_i / d_i for every matrix of the batch, 0 where d_i is 0; in double, rounded once to dtype.

    Powers of two in X and d cancel exactly, so the result does not depend on the scale of X.

    Shapes: X is (..., m, n) with any strides; divisors is 1-D, float64, one per matrix; the result
    is contiguous.
    """
    return divide(X, divisors.view(*X.shape[:-2], 1, 1), dtype).contiguous()


@divide_each.check
def _(X: Tensor, divisors: Tensor, dtype: torch.dtype) -> None:
    name = "divide_each"
    check.tensor(name, "X", X, min_dim=2)
    check.tensor(name, "divisors", divisors)
    check.equal_shape(name, "divisors", divisors, (math.prod(X.shape[:-2]),))
    check.same_device(name, X=[X], divisors=[divisors])
    check.choice(name, "dtype", dtype, check.FLOATS)


def split_norms(X: list[Tensor], norms: Tensor | None) -> list[Tensor | None]:
    """Return the norms of each entry of the list as (..., 1, 1), the shape to divide it by."""
    if norms is None:
        return [None] * len(X)
    batches = [x.shape[:-2] for x in X]
    parts = norms.split([math.prod(b) for b in batches])
    return [p.view(*b, 1, 1) for p, b in zip(parts, batches, strict=True)]
