"""X in the basis Q of its short side, by the product kernel."""

from __future__ import annotations

from orthonorm import ops
from torch import Tensor

from . import tables
from .product import Factors, product, served


def rotation(out: Tensor, X: Tensor, Q: Tensor) -> list[Factors]:
    """out <- X Q, or Q^T X if X is wide."""
    views = tables.views(X, Q, out)
    if X.shape[-2] >= X.shape[-1]:
        return [Factors(x, q, o, o) for x, q, o in views]
    return [Factors(q.mT, x, o, o) for x, q, o in views]


def rotate_(out: Tensor, X: Tensor, Q: Tensor) -> None:
    if not served("product", Q.device, Q.dtype, X.dtype, out.dtype):
        return ops.rotate_.definition(out, X, Q)
    product("product", rotation(out, X, Q), X.device, Q.dtype)
