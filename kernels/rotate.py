"""X in the basis Q of its short side, by the product kernel."""

from __future__ import annotations

from orthonorm import ops
from torch import Tensor

from . import tables
from .product import Factors, product, served


def rotation(out: Tensor, X: Tensor, Q: Tensor, *moments: Tensor) -> list[Factors]:
    """Return products X Q, or Q^T X if X is wide; their end writes out, and moments if given."""
    products = []
    for o, x, q, *others in tables.views(out, X, Q, *moments):
        A, B = (x, q) if X.shape[-2] >= X.shape[-1] else (q.mT, x)
        C, D = others or (o, o)
        products.append(Factors(A, B, C, D, o))
    return products


def rotate_(out: Tensor, X: Tensor, Q: Tensor) -> None:
    if not served("product", Q.dtype, X, Q, out):
        return ops.rotate_.definition(out, X, Q)
    product("product", rotation(out, X, Q), X.device, Q.dtype)
