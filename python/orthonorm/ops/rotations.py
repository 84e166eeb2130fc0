"""K2, changes of basis on a matrix's short side, for the rotated moments of Conda.

Q is orthogonal, k x k with k = min(m, n). It acts on the short side of X; for square X on columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op


def rotated(X: Tensor, Q: Tensor) -> Tensor:
    """Return X in the basis Q: X Q if rows >= columns, else Q^T X."""
    return X @ Q if X.shape[-2] >= X.shape[-1] else Q.mT @ X


def rotated_back(N: Tensor, Q: Tensor) -> Tensor:
    """Return N in the original basis: N Q^T if rows >= columns, else Q N."""
    return N @ Q.mT if N.shape[-2] >= N.shape[-1] else Q @ N


@op("rotate_(Tensor(a!) out, Tensor X, Tensor Q) -> ()")
def rotate_(out: Tensor, X: Tensor, Q: Tensor) -> None:
    """out <- X Q (rows >= columns) or Q^T X: X in the basis Q of its short side.

    X is rounded to the dtype of Q, in which the product is taken. It accumulates in float32 or
    better and is rounded once to the dtype of `out`, which must not overlap X or Q.

    Shapes: out and X are (..., m, n), Q is (..., k, k) with k = min(m, n).
    """
    out.copy_(rotated(X.to(Q.dtype), Q))


@op("rotate_back_(Tensor(a!) W, Tensor N, Tensor Q, Tensor? decay=None) -> ()")
def rotate_back_(W: Tensor, N: Tensor, Q: Tensor, decay: Tensor | None = None) -> None:
    """W <- decay W - N Q^T (rows >= columns) or decay W - Q N: a step out of the basis Q.

    The product is in the dtype of Q and accumulates in float32 or better; W is rounded once.
    `decay` has one element, float32 or float64; None is 1. W must not overlap N or Q.

    Shapes: W and N are (..., m, n), Q is (..., k, k) with k = min(m, n).
    """
    dtype = torch.promote_types(torch.promote_types(W.dtype, Q.dtype), torch.float32)
    kept = W.to(dtype) if decay is None else decay.to(dtype) * W.to(dtype)
    step = rotated_back(N.to(dtype), Q.to(dtype))
    W.copy_(kept - step)


def _check_rotation(name: str, Q: Tensor, **others: Tensor) -> None:
    (first, X), (second, Y) = others.items()
    for label, value in (*others.items(), ("Q", Q)):
        check.tensor(name, label, value, min_dim=2)
    check.same_shapes(name, **{first: [X], second: [Y]})
    k = min(X.shape[-2:])
    check.equal_shape(name, "Q", Q, (*X.shape[:-2], k, k))
    check.same_device(name, **{first: [X], second: [Y], "Q": [Q]})


@rotate_.check
def _(out: Tensor, X: Tensor, Q: Tensor) -> None:
    _check_rotation("rotate_", Q, out=out, X=X)


@rotate_back_.check
def _(W: Tensor, N: Tensor, Q: Tensor, decay: Tensor | None = None) -> None:
    name = "rotate_back_"
    _check_rotation(name, Q, W=W, N=N)
    if decay is not None:
        check.scalar(name, "decay", decay)
        check.same_device(name, W=[W], decay=[decay])
