"""X in the basis Q of its short side, by the product kernel."""

from __future__ import annotations

from orthonorm import ops
from torch import Tensor

from . import tables
from .product import Factors, product, served


def rotate_(out: Tensor, X: Tensor, Q: Tensor) -> None:
    if not served("product", Q.device, Q.dtype, X.dtype, out.dtype):
        return ops.rotate_.definition(out, X, Q)
    tall = X.shape[-2] >= X.shape[-1]
    products = [
        Factors(x, q, o, o) if tall else Factors(q.mT, x, o, o)
        for x, q, o in tables.views(X, Q, out)
    ]
    product("product", products, X.device, Q.dtype)
