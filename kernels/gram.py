"""X X^T: half of the tiles computed, both halves written."""

from __future__ import annotations

from orthonorm import ops
from torch import Tensor

from . import tables
from .product import Factors, product, served


def gram(X: Tensor) -> Tensor:
    if not served("symmetric", X.device, X.dtype):
        return ops.gram.definition(X)
    out = X.new_empty((*X.shape[:-1], X.shape[-2]))
    products = [Factors(x, x.mT, o, o) for x, o in tables.views(X, out)]
    product("symmetric", products, X.device, X.dtype, symmetric=True)
    return out
