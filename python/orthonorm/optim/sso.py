"""The optimizer SSO."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..ops import divide_each, inner, magnitude, power_iteration_
from ..ops.normalize import accumulator
from ..ops.spectral import start_vector
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import FLAG, Rule, whole
from .stacks import beside
from .state import Batch, Updates
from .tensors import numbers


class SSO(Orthogonalizing):
    """Spectral sphere: steepest descent in the spectral norm among matrices of one spectral norm.

    W <- R W / sigma_1(W), W <- W - lr R polar(X + lambda u v^T), X = B / |B|_F.
    R = radius sqrt(m/n). u, v are W's leading singular vectors. lambda is such that the step does
    not change sigma_1 to first order.

    Args:
        params, lr, momentum, nesterov: as Muon; lr is relative to W's norm.
        weight_decay: as Muon; the sphere leaves it little effect.
        radius: R over sqrt(m/n).
        power_steps: power steps per step, which track u and v.
        bisections: halvings of the interval for lambda, each of which takes a polar factor.
        retract: False does not bring W's norm back to R; the direction stays tangent.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz, here
            with ns_coefficients="polar_express".

    lambda solves <u v^T, polar(X + lambda u v^T)> = 0. The left side is the derivative of the
    convex |X + lambda u v^T|_*, so it grows with lambda, and |lambda| <= 2 |X|_*. A fixed number of
    bisections then needs no synchronization with the device. The authors search for a bracket from
    0 and stop at a tolerance, which both synchronize, and add 1e-8 to sigma_1. Defaults are our
    choice.
    State: `momentum_buffer`, `left_vector`, `right_vector`, `step`; 4 bytes per parameter and
    4 (m + n) per matrix in float32.

    Source: arXiv:2601.08393.
    """

    state_names = ("momentum_buffer",)
    counts_steps = True
    mantissas = False
    rules: ClassVar[dict[str, Rule]] = {"radius": check.positive, "power_steps": whole(1),
             "bisections": whole(1), "retract": FLAG}  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: Any = 0.0,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        radius: float = 1.0,
        power_steps: int = 10,
        bisections: int = 20,
        retract: bool = True,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, ns_coefficients="polar_express", lr=lr,
            weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, radius=radius,
            power_steps=power_steps, bisections=bisections, retract=retract,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        *batch, m, n = x.shape
        return {"left_vector": (*batch, m), "right_vector": (*batch, n)}

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        left, right = batch.state["left_vector"], batch.state["right_vector"]
        for w, v, t in zip(batch.params, right, batch.steps, strict=True):
            if t == 1:
                v.copy_(start_vector(w))
        sigma = power_iteration_.unchecked(
            batch.params, left, right, group["power_steps"], "u_first", 0.0
        )
        if group["retract"]:
            self.retract_(batch.params, sigma, group)
        X, tops = [], []
        for u, a, b in zip(
            updates.stacks, beside(updates, left), beside(updates, right), strict=True
        ):
            dtype = accumulator(u)
            X.append(divide_each.unchecked(u, magnitude.unchecked([u]), dtype))
            tops.append(a.to(dtype).unsqueeze(-1) * b.to(dtype).unsqueeze(-2))
        return self.tangent(Updates(X), Updates(tops), group)

    def retract_(self, params: list[Tensor], sigma: Tensor, group: dict[str, Any]) -> None:
        """W <- R W / sigma; W stays the same where sigma is 0 or NaN."""
        counts = [math.prod(w.shape[:-2]) for w in params]
        radii = [
            group["radius"] * math.sqrt(w.shape[-2] / w.shape[-1])
            for w, count in zip(params, counts, strict=True)
            for _ in range(count)
        ]
        size = sigma.double()
        ratios = torch.where(size > 0, numbers(radii, size.device) / size, 1.0)
        parts = ratios.to(accumulator(*params)).split(counts)
        pairs = zip(params, parts, strict=True)
        torch._foreach_mul_(params, [r.view(*w.shape[:-2], 1, 1) for w, r in pairs])

    def tangent(self, X: Updates, tops: Updates, group: dict[str, Any]) -> Updates:
        """Return polar(X + lambda u v^T) with lambda such that it is orthogonal to u v^T."""

        def shifted(lam: Tensor) -> Updates:
            counts = [math.prod(x.shape[:-2]) for x in X.stacks]
            triples = zip(X.stacks, tops.stacks, lam.split(counts), strict=True)
            return self.iterated(
                Updates([torch.addcmul(x, s.to(x.dtype).view(*x.shape[:-2], 1, 1), top)
                         for x, top, s in triples]), group
            )  # fmt: skip

        high = 2 * inner.unchecked(X.stacks, self.polar(X, group, keep=True).stacks)
        low = -high
        for _ in range(group["bisections"]):
            middle = 0.5 * (low + high)
            below = inner.unchecked(tops.stacks, shifted(middle).stacks) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return shifted(0.5 * (low + high))

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        return group["radius"] * math.sqrt(x.shape[-2] / x.shape[-1])
