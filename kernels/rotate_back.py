"""A step out of the basis Q, weights written by the product's epilogue."""

from __future__ import annotations

import torch
from orthonorm import ops
from torch import Tensor

from . import tables
from .product import Factors, product, served


def rotation_back(W: Tensor, N: Tensor, Q: Tensor) -> list[Factors]:
    """N Q^T, or Q N if N is wide, to be taken from W."""
    views = tables.views(W, N, Q)
    if W.shape[-2] >= W.shape[-1]:
        return [Factors(n, q.mT, w, w) for w, n, q in views]
    return [Factors(q, n, w, w) for w, n, q in views]


def rotate_back_(W: Tensor, N: Tensor, Q: Tensor, decay: Tensor | None = None) -> None:
    if not served("product", Q.device, Q.dtype, N.dtype, W.dtype):
        return ops.rotate_back_.definition(W, N, Q, decay)
    dtype = Q.dtype if N.dtype == Q.dtype else torch.float32
    product("product", rotation_back(W, N, Q), W.device, dtype, -1.0, 1.0, decay)
