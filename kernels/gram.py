"""X X^T: half of the tiles computed, both halves written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from orthonorm import ops
from torch import Tensor

from . import tables
from .product import plain, product, served
from .tables import View


def gram(X: Tensor) -> Tensor:
    if not served("symmetric", X.device, X.dtype):
        return ops.gram.definition(X)
    out = X.new_empty((*X.shape[:-1], X.shape[-2]))
    grams(tables.views(X, out), X.device, X.dtype)
    return out


def grams(pairs: Iterable[tuple[View, ...]], device: torch.device, dtype: torch.dtype) -> None:
    """out <- X X^T for every pair (X, out) of a list, of one dtype."""
    products = [plain(x, x.mT, o, o) for x, o in pairs]
    product("symmetric", products, device, dtype, symmetric=True)
