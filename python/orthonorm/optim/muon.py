"""The optimizer Muon."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..ops import muon_step_
from ..polar import Polynomial
from .amp import flags_of
from .orthogonal import Orthogonalizing
from .settings import Common
from .state import Batch, Updates
from .storage import seed_of


class Muon(Orthogonalizing):
    """Momentum orthogonalized by Newton-Schulz; takes all arguments of torch.optim.Muon and more.

    W <- (1 - lr wd) W - lr s(m, n) polar(mu B + (1-mu) G), B <- mu B + (1-mu) G.

    Args:
        params: parameters, named parameters or param groups (`split_params(model)` makes them).
        lr: learning rate of matrix groups, a number or a one-element tensor.
        weight_decay: decoupled, W <- (1 - lr weight_decay) W before the update; a number or a
            one-element tensor.
        momentum: mu of B <- mu B + (1-mu) G.
        nesterov: orthogonalize mu B + (1-mu) G instead of B.
        ns_coefficients: a name of `orthonorm.coefficients.COEFFICIENTS`, one (a, b, c) or a list.
        eps: lower clamp of the Frobenius norm; 0 makes the update independent of the scale of G.
        ns_steps: iterations (None: as many as the coefficients' source runs).
        adjust_lr_fn: shape factor s(m, n), a name of `settings.ADJUST`: "original" (None)
            sqrt(max(1, m/n)), "match_rms_adamw" 0.2 sqrt(max(m, n)), "spectral" sqrt(m/n),
            "spectral_max" sqrt(max(m, n)), "rows" sqrt(m), "none" 1, or another library's name.
        method, precision, restarts: see `orthonorm.polar`.
        **common: options of every optimizer, see `settings.Common`.

    Groups may set `flatten`, `split` and `heads` (views.py), and every argument above.
    State: `momentum_buffer`; 4 bytes per parameter in float32. State dicts of torch.optim.Muon load
    here.

    Source: https://kellerjordan.github.io/posts/muon; torch.optim.Muon.
    """

    state_names = ("momentum_buffer",)
    self_contained = True

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: Any = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = (3.4445, -4.7750, 2.0315),
        eps: float = 0.0,
        ns_steps: int | None = 5,
        adjust_lr_fn: str | None = None,
        *,
        method: str = "auto",
        precision: str = "auto",
        restarts: Any = "auto",
        **common: Unpack[Common],
    ) -> None:
        settings = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            method=method, precision=precision, restarts=restarts,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        return self.polar(updates, group)

    def polar_first(self, p: Tensor, group: dict[str, Any]) -> Polynomial:
        return self.polynomial(group)

    def at_once(self, batch: Batch, group: dict[str, Any]) -> bool:
        if self.in_parts(group):
            return False
        muon_step_.unchecked(
            batch.params, batch.grads, batch.state["momentum_buffer"],
            *self.scheduled(batch, group), *self.iteration(group), seed_of(group),
            *flags_of(self, batch.params[0].device), batch.mantissas,
        )  # fmt: skip
        return True
