"""The optimizer SCALE."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..ops import column_normalize, normalize_columns_
from .amp import Flags
from .base import MatrixOptimizer
from .settings import Common, Rule, at_least
from .state import Batch, Updates


class SCALE(MatrixOptimizer):
    """Gradients scaled to columns (input features) of length one; momentum is optional.

    W <- (1 - lr wd) W - lr U_:j / (|U_:j|_2 + eps), column by column; U = G, or momentum.
    The paper uses momentum in the last layer only: `{"params": [head], "momentum": 0.9}`.

    Args:
        params: parameters, named parameters or param groups.
        lr, weight_decay: as Muon.
        momentum: 0, or mu of B <- mu B + (1-mu) G, U = B.
        norm_eps: eps, added to the columns' lengths.
        **common: options of every optimizer, see `settings.Common`.

    State: none while momentum is 0, else `momentum_buffer`, 4 bytes per parameter in float32.

    Source: arXiv:2506.16659; the defaults of lr and eps are our choice.
    """

    self_contained = True
    state_names = ("momentum_buffer",)
    rules: ClassVar[dict[str, Rule]] = {"norm_eps": at_least(0.0)}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: Any = 0.0,
        momentum: Any = 0.0,
        *,
        norm_eps: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        settings = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, norm_eps=norm_eps)
        super().__init__(params, settings, common)

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        mu = group["momentum"]
        return () if not isinstance(mu, Tensor) and mu == 0 else self.state_names

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        eps = group["norm_eps"]
        return Updates([column_normalize.unchecked(u, 1.0, eps) for u in updates.stacks])

    def directed(
        self,
        batch: Batch,
        stacks: list[Tensor],
        mu: Tensor | None,
        group: dict[str, Any],
        flags: Flags,
    ) -> Updates:
        """Normalize gradients into `stacks` without a copy.

        Take the base's way for momentum, scaled gradients, other dtypes and telemetry.
        """
        updates = Updates(stacks)
        pairs = list(zip(updates.matrices, batch.grads, strict=True))
        alike = all(u.dtype == g.dtype for u, g in pairs)
        if mu is not None or flags.grad_scale is not None or not alike or self.probe(group):
            return super().directed(batch, stacks, mu, group, flags)
        normalize_columns_.unchecked(*map(list, zip(*pairs, strict=True)), group["norm_eps"])
        return updates
