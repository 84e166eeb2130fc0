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
        weight_decay: Any = 0.1,
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
        if group["decay"] == "composite":
            return self.composite(updates, batch, group)
        return self.largest(updates, group)

    def largest(self, updates: Updates, group: dict[str, Any]) -> Updates:
        """Return T of every matrix, the step without decay; it may overwrite the updates."""
        if group["norm"] == "spectral":
            return self.polar(updates, group)
        if group["norm"] == "max":
            return to_signs(updates)
        return to_unit(updates)

    def composite(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        """Return P((B + wd W) / (wd lr)), or T for a wd of 0.

        It is computed in float64, as the ratio may be large. The host must not read a tensor's wd,
        so the device chooses between both.
        """
        known, device = not isinstance(group["weight_decay"], Tensor), batch.params[0].device
        if known and group["weight_decay"] == 0:
            return self.largest(updates, group)
        lr, rate = (self.scalar(group, key, device).double() for key in ("lr", "weight_decay"))
        decays, rate = rate > 0, rate if known else torch.where(rate > 0, rate, 1.0)
        radius = rate * lr.clamp(min=1e-12)

        def found(u: Tensor, w: Tensor) -> Tensor:
            return self.nearest((u.double() + rate * w.double()) / radius, group["norm"])

        pairs = zip(updates.matrices, batch.weights, strict=True)
        if known:
            for u, w in pairs:
                u.copy_(found(u, w))
            return updates
        every = [found(u, w) for u, w in pairs]
        updates = self.largest(updates, group)
        for u, x in zip(updates.matrices, every, strict=True):
            u.copy_(torch.where(decays, x, u.double()))
        return updates

    def nearest(self, x: Tensor, norm: str) -> Tensor:
        """Return the point of the norm's unit ball that is nearest to x."""
        if norm == "spectral":
            return hard_cap(x)
        if norm == "max":
            return x.clamp(-1, 1)
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return x / size.clamp(min=1)

    def weight_decay(self, group: dict[str, Any], device: torch.device) -> Tensor:
        if group["decay"] == "composite":
            return self.number(0.0, device)
        return super().weight_decay(group, device)
