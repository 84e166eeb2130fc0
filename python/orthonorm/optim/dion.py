"""The optimizer Dion."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..ops import column_normalize, magnitude
from ..ops.normalize import accumulator
from .base import MatrixOptimizer
from .norms import counts
from .settings import Common, Rule, scheduled
from .stacks import beside, write_beside_
from .state import Batch, Updates


class Dion(MatrixOptimizer):
    """Orthonormal updates of low rank k by one power step, with error feedback.

    W <- (1 - lr wd) W - lr sqrt(m/n) P Q^T, P = QR(B Q), R = B^T P, Q <- R with unit columns.
    B = M + G. P Q^T has rank k. M <- B - (1-mu) P R^T keeps the rest of B for later steps.

    Args:
        params, lr, weight_decay: as Muon.
        momentum: mu; a step takes 1 - mu of its part P R^T out of M.
        rank_fraction: k over the short side of the matrix; k is rounded up.
        **common: options of every optimizer, see `settings.Common`. `heavy_ball` has no effect.

    Q starts as columns of the cosine transform (the authors' is random normal). If B is zero, W and
    Q stay the same.
    State: `residual_buffer` (M), `right_basis` (Q, n x k), `step`; 4 bytes per parameter and
    4 n k per matrix in float32.

    Source: arXiv:2504.05295, github.com/microsoft/dion at 0a059a45.
    """

    state_names = ("residual_buffer",)
    counts_steps = True
    rules: ClassVar[dict[str, Rule]] = {
        "momentum": scheduled(0.0, 1.0), "rank_fraction": check.positive,
    }  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 0.01,
        weight_decay: Any = 0.01,
        momentum: Any = 0.95,
        rank_fraction: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        settings = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, rank_fraction=rank_fraction
        )
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        *batch, m, n = x.shape
        return {
            "right_basis": (*batch, n, min(m, n, math.ceil(group["rank_fraction"] * min(m, n))))
        }

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        mu = self.momentum(group, batch.params[0].device)
        residuals, bases = batch.state["residual_buffer"], batch.state["right_basis"]
        Q = [start(q) if t == 1 else q for q, t in zip(bases, batch.steps, strict=True)]
        wide = Updates([u.to(accumulator(u)) for u in updates.stacks])
        torch._foreach_add_(wide.matrices, residuals)
        lengths = magnitude.unchecked(wide.stacks).split(counts(wide))
        turned, out = [], []
        for B, q, length in zip(wide.stacks, beside(updates, Q), lengths, strict=True):
            q = q.to(B.dtype)
            P = torch.linalg.qr(B @ q).Q  # arbitrary if B = 0, but then R and all that follows is 0
            R = B.mT @ P
            new = column_normalize.unchecked(R)
            out.append(P @ new.mT)
            subtract_(B, P * (1 - mu.to(B.dtype)), R)
            live = (length != 0).view(*B.shape[:-2], 1, 1)
            turned.append(torch.where(live, new, q))
        write_beside_(residuals, wide.stacks)
        write_beside_(bases, turned)
        return Updates(out)

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        m, n = x.shape[-2:]
        return math.sqrt(m / n)


def subtract_(B: Tensor, P: Tensor, R: Tensor) -> None:
    """B <- B - P R^T in one call of baddbmm_."""
    flat = [t.flatten(0, -3) for t in (B, P, R)]
    flat[0].baddbmm_(flat[1], flat[2].mT, alpha=-1)


def start(q: Tensor) -> Tensor:
    """Return the first Q, columns of the cosine transform: Q_ij = cos(pi (i + 1/2) j / n)."""
    n, k = q.shape[-2:]
    i = torch.arange(n, dtype=torch.float64, device=q.device) + 0.5
    j = torch.arange(k, dtype=torch.float64, device=q.device)
    return (torch.outer(i, j) * (math.pi / max(n, 1))).cos().to(q.dtype).expand(q.shape)
