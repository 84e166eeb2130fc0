"""Muon: W <- (1 - lr wd) W - lr s(m, n) polar(mu B + (1-mu) G), B <- mu B + (1-mu) G."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from .. import _checks as check
from ..ops import muon_step_
from ..ops.newton_schulz import FORMS, PRECISIONS
from ..polar import Polynomial, polynomial
from .base import Batch, MatrixOptimizer

ADJUST = {  # factor on the polar factor of an m x n matrix
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # kellerjordan.github.io/posts/muon
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # arXiv:2502.16982
    "spectral": lambda m, n: math.sqrt(m / n),  # arXiv:2310.17813
}


class Muon(MatrixOptimizer):
    """Momentum orthogonalized by Newton-Schulz; takes all that torch.optim.Muon takes and more.

    Args:
        params: parameters, named parameters or param groups (`split_params(model)` makes them).
        lr: learning rate of matrix groups, a number or a one-element tensor.
        weight_decay: decoupled, W <- (1 - lr weight_decay) W before the update.
        momentum: mu of B <- mu B + (1-mu) G.
        nesterov: orthogonalize mu B + (1-mu) G instead of B.
        ns_coefficients: a name of `orthonorm.coefficients.COEFFICIENTS`, one (a, b, c) or a list.
        eps: lower clamp of the Frobenius norm; 0 makes the update independent of the scale of G.
        ns_steps: iterations.
        adjust_lr_fn: shape factor s(m, n): "original" (None) sqrt(max(1, m/n)),
            "match_rms_adamw" 0.2 sqrt(max(m, n)), "spectral" sqrt(m/n).
        method, precision, restarts: see `orthonorm.polar`.
        nonfinite: "propagate", "skip" (leave parameter and state, count in group["skipped"]) or
            "error" (raise before anything is written).
        adamw: settings of groups with rule="adamw" (lr 3e-4, betas (0.9, 0.95), eps 1e-8, decay 0).

    Groups may set `flatten`, `split` and `heads` (optim/views.py), and every argument above.
    State: `momentum_buffer`, as torch.optim.Muon, whose state dicts load here.

    Source: https://kellerjordan.github.io/posts/muon; torch.optim.Muon.
    """

    elementwise_state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = (3.4445, -4.7750, 2.0315),
        eps: float = 0.0,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        method: str = "auto",
        precision: str = "auto",
        restarts: Any = "auto",
        nonfinite: str = "propagate",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            method=method, precision=precision, restarts=restarts, nonfinite=nonfinite,
        )  # fmt: skip
        super().__init__(params, defaults, adamw)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check.scheduled("Muon", "momentum", group["momentum"], 0.0, 1.0)
        check.choice("Muon", "nesterov", group["nesterov"], (True, False))
        check.number("Muon", "eps", group["eps"], 0.0)
        check.choice("Muon", "adjust_lr_fn", group["adjust_lr_fn"], (None, *ADJUST))
        check.choice("Muon", "method", group["method"], FORMS)
        check.choice("Muon", "precision", group["precision"], PRECISIONS)
        self._polynomial(group)

    def _polynomial(self, group: Mapping[str, Any]) -> Polynomial:
        device = group["params"][0].device if group["params"] else None
        return polynomial(
            group["ns_coefficients"], group["ns_steps"], method=group["method"],
            restarts=group["restarts"], precision=group["precision"], device=device,
        )  # fmt: skip

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        p = self._polynomial(group)
        factor = ADJUST[group["adjust_lr_fn"] or "original"]
        device = batch.params[0].device
        muon_step_.overload(
            batch.params, batch.grads, batch.state["momentum_buffer"],
            self.scalar(group, "lr", device), self.scalar(group, "momentum", device),
            group["weight_decay"], [factor(*x.shape[-2:]) for x in batch.params],
            p.coefficients, p.restarts, group["nesterov"], group["method"], p.precision,
            p.scale, group["eps"], p.safety,
        )  # fmt: skip
