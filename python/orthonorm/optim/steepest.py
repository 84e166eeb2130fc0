"""The optimizer SteepestDescent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..ops import inner, row_normalize
from .norms import lengthened, sent_exactly, to_signs
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import FLAG, Rule, one_of
from .state import Batch, Updates

SIZES = {  # norm -> factor of the matrix that `largest` returns, to make its norm 1
    "linear": lambda m, n: math.sqrt(m / n),
    "embedding": lambda m, n: math.sqrt(n),
    "head": lambda m, n: 1 / math.sqrt(n),
    "max": lambda m, n: 1.0,
}


class SteepestDescent(Orthogonalizing):
    """Steepest descent in the norm of each group's role, at the length that the norm gives.

    W <- (1 - lr wd) W - lr <U, T> T, T of norm 1 with <U, T> largest.
    U = G, or its momentum. <U, T> is the dual norm of U. The step D = -lr <U, T> T minimizes
    <U, D> + |D|^2 / (2 lr) in the norm of the group's role.

    Args:
        params: parameters, named parameters or param groups with their `norm`.
        lr, weight_decay: as Muon; lr is one over the sharpness in that norm.
        momentum: 0, or mu of B <- mu B + (1-mu) G, U = B.
        norm: norm of an m x n weight; T follows from it:
            "linear": RMS -> RMS operator norm; T = sqrt(m/n) polar(U).
            "embedding": l1 -> RMS, tables stored vocabulary x width; T_i = sqrt(n) U_i / |U_i|.
            "head": RMS -> max; T_i = U_i / (sqrt(n) |U_i|).
            "max": the largest entry; T = sign(U).
        dual: False leaves <U, T> out: W - lr T, Modula's dualization. If the norm of all weights is
            the largest over layers, lr then also takes the place of the sum of their dual norms.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    State: none while momentum is 0, else `momentum_buffer`, 4 bytes per parameter in float32.

    Source: arXiv:2409.20325, github.com/modula-systems/modula at ede2ba72; lr is our choice.
    """

    self_contained = True
    state_names = ("momentum_buffer",)
    rules: ClassVar[dict[str, Rule]] = {"norm": one_of(*SIZES), "dual": FLAG}

    def __init__(
        self,
        params: Any,
        lr: Any = 0.01,
        weight_decay: Any = 0.0,
        momentum: Any = 0.0,
        norm: str = "linear",
        *,
        dual: bool = True,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, weight_decay=weight_decay, momentum=momentum, norm=norm,
            dual=dual,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        mu = group["momentum"]
        return () if not isinstance(mu, Tensor) and mu == 0 else self.state_names

    def iterates(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        return group["norm"] == "linear" and sent_exactly(p)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        T = self.largest(updates, group)
        return lengthened(T, inner.unchecked(updates.stacks, T.stacks)) if group["dual"] else T

    def largest(self, updates: Updates, group: dict[str, Any]) -> Updates:
        """Return T without its factor of SIZES; with `dual` the updates are not overwritten."""
        if group["norm"] == "linear":
            return self.polar(updates, group, keep=group["dual"])
        if group["norm"] == "max":
            return to_signs(Updates([u.clone() for u in updates.stacks]))
        return Updates([row_normalize.unchecked(u) for u in updates.stacks])

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        size = SIZES[group["norm"]](*x.shape[-2:])
        return size * size if group["dual"] else size
