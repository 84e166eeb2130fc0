"""The optimizer TrustRegion."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..nn.lipschitz import hard_cap
from .norms import to_signs, to_unit
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import DECAYS, Rule, one_of
from .state import Batch, Updates


class TrustRegion(Orthogonalizing):
    """Orthogonalized, sign or normalized momentum: steepest descent in a norm, of radius lr.

    W <- argmin_X <B, X> + wd/2 |X|_F^2 over |X - W| <= lr, B <- mu B + (1-mu) G.
    Without decay that is W - lr T, T of norm 1 with <B, T> largest: polar(B) for the spectral norm,
    sign(B) for the largest entry, B / |B|_F for the Frobenius norm.

    Args:
        params, lr, momentum: as Muon.
        weight_decay: rate of the group's `decay`. Here `decay` may also be "composite": the exact
            minimizer above, W - lr P((B + wd W) / (wd lr)), P the nearest point of the unit ball.
            Others decay W apart from the step.
        norm: "spectral", "max" (sign) or "frobenius" (normalized).
        nesterov, adjust_lr_fn ("none"): as Muon.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    Composite steps of the spectral norm take two exact polar factors instead of one by
    Newton-Schulz.
    State: `momentum_buffer`; 4 bytes per parameter in float32.

    Source: arXiv:2503.12645.
    """

    state_names = ("momentum_buffer",)
    self_contained = True
    decays = (*DECAYS, "composite")
    rules: ClassVar[dict[str, Rule]] = {"norm": one_of("spectral", "max", "frobenius")}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        norm: str = "spectral",
        *,
        nesterov: bool = False,
        adjust_lr_fn: str | None = "none",
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, weight_decay=weight_decay, momentum=momentum, norm=norm,
            nesterov=nesterov, adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        if group["decay"] == "composite" and group["weight_decay"] > 0:
            return self.composite(updates, batch, group)
        if group["norm"] == "spectral":
            return self.polar(updates, group)
        if group["norm"] == "max":
            return to_signs(updates)
        return to_unit(updates)

    def composite(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        """Return P((B + wd W) / (wd lr)); it is computed in float64, as the ratio may be large."""
        rate = group["weight_decay"]
        radius = rate * self.scalar(group, "lr", batch.params[0].device).double().clamp(min=1e-12)
        for u, w in zip(updates.matrices, batch.weights, strict=True):
            u.copy_(self.nearest((u.double() + rate * w.double()) / radius, group["norm"]))
        return updates

    def nearest(self, x: Tensor, norm: str) -> Tensor:
        """Return the point of the norm's unit ball that is nearest to x."""
        if norm == "spectral":
            return hard_cap(x)
        if norm == "max":
            return x.clamp(-1, 1)
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return x / size.clamp(min=1)

    def weight_decay(self, group: dict[str, Any]) -> float:
        return 0.0 if group["decay"] == "composite" else group["weight_decay"]
