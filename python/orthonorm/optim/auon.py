"""The optimizers AuON and HybridAuON."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops import divide_each, magnitude, mean_sinh_square
from .base import MatrixOptimizer
from .norms import counts
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least, one_of
from .state import Batch, Updates

AFTER = 1e-8  # added to rho


class AuON(MatrixOptimizer):
    """Momentum over the root mean square of cosh of its entries, for parameters of any shape.

    W <- (1 - lr wd) W - lr U / (rho + 1e-8), rho = sqrt(mean cosh(gamma U / |U|_F)^2).
    U = mu B + (1-mu) G.

    Args:
        params, lr, weight_decay, momentum, nesterov: as Muon.
        variant: "code": U / (rho + 1e-8) as above; "paper": X / (rho + 1e-8) with X = U / |U|_F and
            gamma = 1 in rho.
        gamma: factor in rho, for "code".
        norm_eps: added to |U|_F.
        **common: options of every optimizer, see `settings.Common`.

    The N entries of U / |U|_F are about 1 / sqrt(N), so rho is about 1 + gamma^2 / (2N). Up to that
    factor, "code" is SGD with momentum and "paper" is normalized SGD with momentum.
    State: `momentum_buffer`; 4 bytes per parameter in float32.

    Source: arXiv:2509.24320, github.com/ryyzn9/AuON at bba2e822.
    """

    self_contained = True
    state_names = ("momentum_buffer",)
    min_dim = 0
    rules: ClassVar[dict[str, Rule]] = {
        "variant": one_of("code", "paper"), "gamma": at_least(0.0), "norm_eps": at_least(0.0),
    }  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 0.24,
        weight_decay: Any = 0.0,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        variant: str = "code",
        gamma: float = 1.5,
        norm_eps: float = 1e-7,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            self.polynomial_settings(variant), lr=lr, weight_decay=weight_decay,
            momentum=momentum, nesterov=nesterov, variant=variant, gamma=gamma, norm_eps=norm_eps,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def polynomial_settings(self, variant: str) -> dict[str, Any]:
        """Return settings of the polynomial: none, as AuON has no polynomial."""
        return {}

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        paper = group["variant"] == "paper"
        return braked(updates, 1.0 if paper else group["gamma"], group["norm_eps"], unit=paper)


class HybridAuON(Orthogonalizing, AuON):
    """Muon without a shape factor, over the root mean square of cosh of its entries.

    W <- (1 - lr wd) W - lr O / (rho + 1e-8), O = polar(U), rho as AuON's of gamma O.

    Args:
        params, lr, weight_decay, momentum, nesterov, gamma, norm_eps: as AuON.
        variant: "code": five Newton-Schulz steps, then O / (rho + 1e-8) with rho of O; "paper": one
            step, then O / (rho + 1e-8), rho = mean cosh(O)^2 without a root, as printed.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    State: `momentum_buffer`; 4 bytes per parameter in float32.

    Source: as AuON's.
    """

    min_dim = 2
    rules: ClassVar[dict[str, Rule]] = AuON.rules

    def polynomial_settings(self, variant: str) -> dict[str, Any]:
        return {**NEWTON_SCHULZ, "ns_steps": 1 if variant == "paper" else 5}

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        factors = self.polar(updates, group)
        if group["variant"] == "code":
            return braked(factors, group["gamma"], group["norm_eps"])
        ones = torch.ones(
            sum(counts(factors)), dtype=torch.float64, device=factors.stacks[0].device
        )
        return divided(factors, mean_cosh_square(factors, ones) + AFTER)


def braked(updates: Updates, gamma: float, norm_eps: float, unit: bool = False) -> Updates:
    """Return U / (rho + AFTER); with `unit`, of U / (|U|_F + norm_eps) instead of U."""
    norms = magnitude.unchecked(updates.stacks) if updates.norms is None else updates.norms
    size = norms + norm_eps
    rho = mean_cosh_square(updates, size / gamma if gamma else size * math.inf).sqrt() + AFTER
    return divided(updates, size * rho if unit else rho)


def mean_cosh_square(updates: Updates, divisors: Tensor) -> Tensor:
    """Return mean_ij cosh(U_ij / d)^2 of every matrix, 1-D float64."""
    return 1 + mean_sinh_square.unchecked(updates.stacks, divisors)


def divided(updates: Updates, numbers: Tensor) -> Updates:
    """Return U / number in new stacks; `numbers` is 1-D, one per matrix."""
    pairs = zip(updates.stacks, numbers.split(counts(updates)), strict=True)
    return Updates([divide_each.unchecked(x, d, x.dtype) for x, d in pairs])
