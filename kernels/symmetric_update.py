"""beta C + alpha A B, symmetric: half of the tiles are computed, both halves written."""

from __future__ import annotations

import torch
from orthonorm import ops
from torch import Tensor

from . import tables
from .product import plain, product, served


def symmetric_update(
    C: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    if not served("symmetric", A.dtype, A):
        return ops.symmetric_update.definition(C, A, B, alpha, beta)
    out = torch.empty_like(C, memory_format=torch.contiguous_format)
    products = [plain(a, b, c, o) for a, b, c, o in tables.views(A, B, C, out)]
    product("symmetric", products, C.device, C.dtype, alpha, beta, symmetric=True)
    return out
