"""The optimizer PolarGrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops import inner
from .norms import lengthened, sent_exactly
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import FLAG, Rule
from .state import Batch, Updates


class PolarGrad(Orthogonalizing):
    """Muon times the nuclear norm of the matrix that is orthogonalized.

    W <- (1 - lr wd) W - lr <B, U> U, U = polar(B), B <- mu B + (1-mu) G.
    <B, U> is the nuclear norm of B: steepest descent in the spectral norm, at the length that the
    norm gives.

    Args:
        params, lr, weight_decay, momentum, nesterov (False): as Muon.
        polar_first: average the factors instead of the gradients: U = polar(G), B <- mu B +
            (1-mu) U, step <G, U> B.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz, here
            with ns_coefficients="polar_express". The authors use QDWH, whose factor is exact. Their
            Newton-Schulz has c = 2.031, a misprint of 2.0315.

    State: `momentum_buffer` (`factor_buffer` with polar_first); 4 bytes per parameter in float32.

    Source: arXiv:2505.21799, github.com/timlautk/polargrad at 79590d7f.
    """

    self_contained = True
    state_names = ("momentum_buffer",)
    rules: ClassVar[dict[str, Rule]] = {"polar_first": FLAG}

    def __init__(
        self,
        params: Any,
        lr: Any = 0.02,
        weight_decay: Any = 0.0,
        momentum: float = 0.95,
        *,
        polar_first: bool = False,
        nesterov: bool = False,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, ns_coefficients="polar_express", ns_steps=None, lr=lr,
            weight_decay=weight_decay, momentum=momentum, polar_first=polar_first,
            nesterov=nesterov,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("factor_buffer",) if group["polar_first"] else self.state_names

    def iterates(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        return sent_exactly(p)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        factors = self.polar(updates, group, keep=True)
        size = inner.unchecked(updates.stacks, factors.stacks)
        if group["polar_first"]:
            mu = self.momentum(group, size.device)
            matrices = factors.matrices
            torch._foreach_mul_(batch.state["factor_buffer"], mu)
            torch._foreach_mul_(matrices, 1 - mu)
            torch._foreach_add_(batch.state["factor_buffer"], matrices)
            torch._foreach_copy_(matrices, batch.state["factor_buffer"])
        return lengthened(factors, size)
