"""A step rotated back from the basis Q; the end of the product writes the weights."""

from __future__ import annotations

import torch
from orthonorm import ops
from torch import Tensor

from . import ends, tables
from .product import Factors, plain, product, served


def rotation_back(W: Tensor, N: Tensor, Q: Tensor, extra: ends.Extra = ends.PLAIN) -> list[Factors]:
    """Return products N Q^T, or Q N if N is wide, for an end that updates W."""
    views = tables.views(W, N, Q)
    if W.shape[-2] >= W.shape[-1]:
        return [plain(n, q.mT, w, w, extra) for w, n, q in views]
    return [plain(q, n, w, w, extra) for w, n, q in views]


def rotate_back_(W: Tensor, N: Tensor, Q: Tensor, decay: Tensor | None = None) -> None:
    dtype = Q.dtype if N.dtype == Q.dtype else torch.float32
    if not served("product", dtype, W, N, Q):
        return ops.rotate_back_.definition(W, N, Q, decay)
    product("product", rotation_back(W, N, Q), W.device, dtype, end=ends.decayed(decay))
