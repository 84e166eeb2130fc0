"""The optimizer AdaGO."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..ops import magnitude
from .norms import multiply_each_
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least
from .state import Batch, Updates


class AdaGO(Orthogonalizing):
    """Muon with AdaGrad's step size, from the norms of the gradients of each matrix.

    W <- (1 - lr wd) W - max(floor, lr min(|G|_F, gamma) / v) polar(B), v^2 = v0^2 + S.
    B <- mu B + (1-mu) G, S <- S + min(|G|_F^2, gamma^2), one number per matrix.

    Args:
        params, lr, weight_decay, momentum: as Muon.
        gamma: upper clamp of the gradients' norms.
        floor: the smallest step size (the paper's epsilon); while lr is 0 nothing moves.
        v0: v before the first step.
        nesterov: orthogonalize mu B + (1-mu) G instead of B. The norm stays that of G.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    The norm is Frobenius's. Which norm the paper means could not be checked, nor its numbers: the
    defaults are our choice. Other implementations divide by v^2.
    State: `momentum_buffer`, `norm_sum` (S and its rounding error); 4 bytes per parameter and 8 per
    matrix in float32.

    Source: arXiv:2509.02981.
    """

    state_names = ("momentum_buffer",)
    rules: ClassVar[dict[str, Rule]] = {"gamma": check.positive, "floor": at_least(0.0),
                                        "v0": check.positive}  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 0.05,
        weight_decay: Any = 0.0,
        momentum: float = 0.95,
        *,
        gamma: float = 10.0,
        floor: float = 5e-4,
        v0: float = 1e-3,
        nesterov: bool = False,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, weight_decay=weight_decay, momentum=momentum, gamma=gamma,
            floor=floor, v0=v0, nesterov=nesterov,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"norm_sum": (*x.shape[:-2], 1, 2)}

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        clipped = magnitude.unchecked(batch.grads).clamp(max=group["gamma"])
        total = add_(batch.state["norm_sum"], clipped.square())
        ratio = clipped / (total + group["v0"] ** 2).sqrt()
        lr = self.scalar(group, "lr", ratio.device).double()
        least = torch.where(lr > 0, group["floor"] / lr, 0.0)
        return multiply_each_(self.polar(updates, group), torch.maximum(ratio, least))


def add_(sums: list[Tensor], new: Tensor) -> Tensor:
    """Add `new` to each S; return the sums, 1-D float64.

    `sums` store S and its rounding error in their own dtype, (..., 1, 2), and are overwritten.
    """
    pairs = torch.cat([s.reshape(-1, 2) for s in sums])
    total = pairs.double().sum(1) + new
    high = total.to(pairs.dtype)
    low = (total - high.double()).to(pairs.dtype)
    rows = torch.stack((high, low), 1).split([s.numel() // 2 for s in sums])
    torch._foreach_copy_(sums, [r.view(s.shape) for r, s in zip(rows, sums, strict=True)])
    return total
