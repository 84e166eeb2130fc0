"""Shampoo: W <- (1 - lr wd) W - lr L^(-1/4) U R^(-1/4), L <- L + G G^T, R <- R + G^T G.

U is the gradient, or its momentum.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from .base import MatrixOptimizer
from .settings import Common, Rule, one_of, whole
from .sides import SIDES, averaged, between, inverse_root, side_shapes
from .state import Batch, Updates


class Side(NamedTuple):
    """What a step leaves of one side of a matrix."""

    gram: Tensor
    root: Tensor | None = None


class Shampoo(MatrixOptimizer):
    """Preconditioning of both sides of a matrix.

    Args:
        params: parameters, named parameters or param groups (`split_params(model)` makes them).
        lr, weight_decay: as Muon.
        momentum, nesterov: of U; 0, as published, is the gradient itself.
        beta2: 1, as published, sums G G^T; below, L <- beta2 L + (1-beta2) G G^T.
        eps: L and R start as eps I (beta2 = 1), or eps I is added to them before the root.
        precondition_frequency: steps between new roots.
        max_precond_dim: longer sides are not preconditioned.
        variant: "textbook", or "study" (the code of arXiv:2510.25000): L and R are averages, over
            the other side's length, of G / (sqrt(V) + eps), V <- beta2 V + (1-beta2) G^2, and so is
            the bias-corrected momentum preconditioned, with roots of the step before, times the
            mean root of R's diagonal; L and R are bias-corrected, and kept so, at each new root.
            Its roots amplify rounding by 1e4 where L or R is singular, as they are for any but
            square matrices until min(m, n) steps times their number reach the long side.
        **common: what every optimizer takes, see `settings.Common`.

    State: `momentum_buffer`, `left_gram`, `right_gram`, `left_root`, `right_root`, `step`, and
    `second_moment` for the study's; 4 (8) bytes per parameter in float32 and 8 (m^2 + n^2) per
    matrix.

    Source: arXiv:1802.09568.
    """

    state_names = ("momentum_buffer",)
    counts_steps = True
    rules: ClassVar[dict[str, Rule]] = {
        "beta2": lambda name, key, value: check.number(name, key, value, 0.0, 1.0),
        "precondition_frequency": whole(1),
        "max_precond_dim": whole(0),
        "variant": one_of("textbook", "study"),
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        beta2: float = 1.0,
        eps: float = 1e-6,
        precondition_frequency: int = 1,
        max_precond_dim: int = 10000,
        *,
        nesterov: bool = False,
        variant: str = "textbook",
        **common: Unpack[Common],
    ) -> None:
        settings = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, eps=eps,
            precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim,
            nesterov=nesterov, variant=variant,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        more = ("second_moment",) if group["variant"] == "study" else ()
        return self.state_names + more

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return side_shapes(x, group, "gram", "root")

    def prepare(self, batch: Batch, group: dict[str, Any]) -> list[list[Side]]:
        """The averages with this gradient, and their roots where these are due."""
        beta, study = group["beta2"], group["variant"] == "study"
        found = []
        for i, (g, t) in enumerate(zip(batch.grads, batch.steps, strict=True)):
            state, (m, n) = {key: values[i] for key, values in batch.state.items()}, g.shape[-2:]
            if study:
                V = beta * state["second_moment"] + (1 - beta) * g * g
                g, weights = g / (V.sqrt() + group["eps"]), ((1 - beta) / n, (1 - beta) / m)
            else:
                weights = (1 - beta, 1 - beta) if beta < 1 else (1.0, 1.0)
            grams = averaged(state, g, beta, weights)
            if (t - 1) % group["precondition_frequency"]:
                found.append([Side(A) for A in grams])
            elif study:
                grams = [A / (1 - beta**t) for A in grams]
                found.append([Side(A, inverse_root(A, 0.25, 1e-8, 1e-30)) for A in grams])
            else:
                found.append([Side(A, inverse_root(A, 0.25, 0.0, group["eps"])) for A in grams])
        return found

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        """The study preconditions by what the step before left."""
        if group["variant"] == "study":
            super().update(batch, group)
        for i, sides in enumerate(batch.prepared):
            for name, side in zip(SIDES, sides, strict=True):
                batch.state[f"{name}_gram"][i].copy_(side.gram)
                if side.root is not None:
                    batch.state[f"{name}_root"][i].copy_(side.root)
        if group["variant"] == "textbook":
            super().update(batch, group)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        s = batch.state
        for i, (u, t) in enumerate(zip(updates.matrices, batch.steps, strict=True)):
            size: Tensor | float = 1.0
            if group["variant"] == "study":
                beta, g, V = group["beta2"], batch.grads[i], s["second_moment"][i]
                V.mul_(beta).addcmul_(g, g, value=1 - beta)
                u.div_((1 - group["momentum"] ** t) * (V.sqrt() + group["eps"]))
                diagonal = s["right_gram"][i].diagonal(dim1=-2, dim2=-1)
                size = diagonal.sqrt().mean(-1)[..., None, None]
            u.copy_(between(s["left_root"][i], u, s["right_root"][i]) * size)
        return updates
