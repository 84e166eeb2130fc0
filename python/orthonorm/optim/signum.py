"""The optimizer Signum."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from ..ops import signum_step_
from ..ops.words import HALF
from .amp import flags_of
from .base import MatrixOptimizer
from .norms import to_signs
from .settings import Common
from .state import Batch, Updates


class Signum(MatrixOptimizer):
    """Sign descent with momentum, for parameters of any shape.

    W <- (1 - lr wd) W - lr sign(B), B <- mu B + (1-mu) G.

    Args:
        params: parameters, named parameters or param groups.
        lr, weight_decay, momentum, nesterov: as Muon; the defaults are the study's.
        **common: options of every optimizer, see `settings.Common`.

    State: `momentum_buffer`; 4 bytes per parameter in float32.

    Source: arXiv:1802.04434; settings of arXiv:2510.25000.
    """

    state_names = ("momentum_buffer",)
    min_dim = 0
    elementwise = self_contained = True

    def __init__(
        self,
        params: Any,
        lr: Any = 1.77e-4,
        weight_decay: Any = 3.162,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        settings = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
        super().__init__(params, settings, common)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        return to_signs(updates)

    def at_once(self, batch: Batch, group: dict[str, Any]) -> bool:
        """Do the step by `signum_step_`, but decline half precision.

        There updates are rounded before their signs are taken, also on sharded parameters. The op
        takes signs of unrounded updates.
        """
        other = group["heavy_ball"] or group["decay"] != "decoupled" or self.probe(group)
        if other or batch.mantissas or any(p.dtype in HALF for p in batch.params):
            return False
        device = batch.params[0].device
        signum_step_.unchecked(
            batch.params, batch.grads, batch.state["momentum_buffer"],
            self.scalar(group, "lr", device), self.momentum(group, device),
            self.weight_decay(group, device), self.factors(batch, group), group["nesterov"],
            *flags_of(self, device),
        )  # fmt: skip
        return True
