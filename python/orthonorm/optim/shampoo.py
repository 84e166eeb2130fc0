"""The optimizer Shampoo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from .base import MatrixOptimizer
from .settings import Common, Rule, one_of, whole
from .sides import SIDES, averaged_with, between, inverse_root, side_shapes
from .stacks import alike, beside, stacked, write_
from .state import Batch, Updates
from .tensors import numbers

LARGEST = 1e32  # what the Gram matrices of "study" may grow by; their entries begin near 1


class Side(NamedTuple):
    """New state of one side of a matrix after a step; root is None if it is not due."""

    gram: Tensor
    root: Tensor | None = None


class Shampoo(MatrixOptimizer):
    """Gradients preconditioned on both sides of a matrix.

    W <- (1 - lr wd) W - lr L^(-1/4) U R^(-1/4), L <- L + G G^T, R <- R + G^T G.
    U is the gradient, or its momentum.

    Args:
        params: parameters, named parameters or param groups (`split_params(model)` makes them).
        lr, weight_decay: as Muon.
        momentum, nesterov: of U; momentum 0, as published, makes U the gradient.
        beta2: 1, as published, sums G G^T; below 1, L <- beta2 L + (1-beta2) G G^T.
        eps: eps I is added to L and R before the root, as if they had started there for beta2 = 1;
            0 takes roots of the pseudo-inverse. "study" adds eps to sqrt(V) only.
        precondition_frequency: steps between new roots.
        max_precond_dim: longer sides are not preconditioned.
        variant: "textbook", or "study" (the code of arXiv:2510.25000). The study divides G by
            sqrt(V) + eps, V <- beta2 V + (1-beta2) G^2. L and R average the Gram matrices of the
            result, each over the other side's length. They are bias-corrected at each new root, and
            stored so. The bias-corrected momentum is divided in the same way, preconditioned with
            the roots of the step before, and multiplied by the mean of sqrt(R_jj).
            Its roots amplify rounding by 1e4 where L or R is singular. All but square matrices have
            a singular one until steps times min(m, n) reach the long side. They grow by
            1 / (1 - beta2^t) at each new root: beta2 >= 1, and growth beyond LARGEST (beta2 = 0.99
            with new roots at every step), are refused.
        **common: options of every optimizer, see `settings.Common`.

    State: `momentum_buffer`, `left_gram`, `right_gram`, `left_root`, `right_root`, `step`, and
    `second_moment` for "study"; in float32 4 bytes per parameter (8 for "study") and
    8 (m^2 + n^2) per matrix (float32 beside weights of 16 bits too).

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
        weight_decay: Any = 0.0,
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

    def check_group(self, group: Mapping[str, Any]) -> None:
        if group["variant"] != "study":
            return
        beta, every = group["beta2"], group["precondition_frequency"]
        for key in ("beta2", "momentum"):
            if not isinstance(group[key], Tensor) and group[key] >= 1:
                raise ValueError(
                    f"{self.name}: {key} must be below 1 with variant='study', got {group[key]}"
                )
        if (growth := log_growth(beta, every) / math.log(10)) > math.log10(LARGEST):
            raise ValueError(
                f"{self.name}: precondition_frequency must be larger with variant='study' and "
                f"beta2={beta}, whose Gram matrices would grow by 1e{growth:.0f}, got {every}"
            )

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        more = ("second_moment",) if group["variant"] == "study" else ()
        return self.state_names + more

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return side_shapes(x, group, "gram", "root")

    def prepare(self, batch: Batch, group: dict[str, Any]) -> list[tuple[list[int], list[Side]]]:
        """Return (indices, sides) per shape and step: averages with this gradient, roots if due."""
        beta, study = group["beta2"], group["variant"] == "study"
        found = []
        for indices, t in alike(batch):
            G, *old = (
                stacked([values[i] for i in indices])
                for values in (batch.grads, *(batch.state[f"{side}_gram"] for side in SIDES))
            )
            G = G.to(old[0].dtype)
            m, n = G.shape[-2:]
            weights = (1 - beta, 1 - beta) if beta < 1 else (1.0, 1.0)
            if study:
                V = stacked([batch.state["second_moment"][i] for i in indices])
                V = beta * V + (1 - beta) * G * G
                G, weights = G / (V.sqrt() + group["eps"]), ((1 - beta) / n, (1 - beta) / m)
            grams = averaged_with(old, G, beta, weights)
            if (t - 1) % group["precondition_frequency"]:
                sides = [Side(A) for A in grams]
            elif study:
                grams = [A / (1 - beta**t) for A in grams]
                sides = [Side(A, inverse_root(A, 0.25, 1e-8, 1e-30)) for A in grams]
            else:
                sides = [Side(A, inverse_root(A, 0.25, 0.0, group["eps"])) for A in grams]
            found.append((indices, sides))
        return found

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        """Update weights and averages; "study" takes the roots that the step before left."""
        if group["variant"] == "study":
            super().update(batch, group)
        for indices, sides in batch.prepared:
            for name, side in zip(SIDES, sides, strict=True):
                write_(batch.state[f"{name}_gram"], indices, side.gram)
                if side.root is not None:
                    write_(batch.state[f"{name}_root"], indices, side.root)
        if group["variant"] == "textbook":
            super().update(batch, group)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        study = group["variant"] == "study"
        if study:
            self.normalize_(updates, batch, group)
        roots = [beside(updates, batch.state[f"{side}_root"]) for side in SIDES]
        triples = zip(updates.stacks, *roots, strict=True)  # roots are too large for float16
        out = [between(left, u.to(left.dtype), right) for u, left, right in triples]
        if study:
            for u, A in zip(out, beside(updates, batch.state["right_gram"]), strict=True):
                diagonal = A.diagonal(dim1=-2, dim2=-1)
                u.mul_(diagonal.sqrt().mean(-1)[..., None, None])
        return Updates(out)

    def normalize_(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> None:
        """U <- U / (1 - mu^t) / (sqrt(V) + eps), after V has taken this gradient in."""
        beta, V, matrices = group["beta2"], batch.state["second_moment"], updates.matrices
        torch._foreach_mul_(V, beta)
        torch._foreach_addcmul_(V, batch.grads, batch.grads, value=1 - beta)
        divisors = torch._foreach_sqrt(V)
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_div_(matrices, divisors)
        means = [1 / (1 - group["momentum"] ** t) for t in batch.steps]
        corrections = numbers(means, V[0].device)
        torch._foreach_mul_(matrices, list(corrections.to(matrices[0].dtype).unbind()))


@lru_cache(64)
def log_growth(beta: float, every: int) -> float:
    """Return log prod_k 1 / (1 - beta^t), t = 1 + k every: what "study" multiplies averages by."""
    total, power = 0.0, beta
    while power > 1e-6 and total < 1e3:
        total -= math.log1p(-power)
        power *= beta**every
    return total
