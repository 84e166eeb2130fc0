"""A step out of the basis Q, weights written by the product's epilogue."""

from __future__ import annotations

import torch
from orthonorm import ops
from torch import Tensor

from . import tables
from .product import Factors, product, served


def rotate_back_(W: Tensor, N: Tensor, Q: Tensor, decay: Tensor | None = None) -> None:
    dtype = Q.dtype if N.dtype == Q.dtype else torch.float32
    if not served("product", Q.device, Q.dtype, N.dtype, W.dtype):
        return ops.rotate_back_.definition(W, N, Q, decay)
    tall = W.shape[-2] >= W.shape[-1]
    products = [
        Factors(n, q.mT, w, w) if tall else Factors(q, n, w, w) for w, n, q in tables.views(W, N, Q)
    ]
    product("product", products, W.device, dtype, -1.0, 1.0, decay)
