"""The optimizer MuonEq."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.normalize import accumulator, inverse
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least, one_of
from .state import Batch, Updates

SIDES = {"row": (-1,), "column": (-2,), "both": (-1, -2)}  # dimensions that are summed over


class MuonEq(Orthogonalizing):
    """Muon on momentum whose rows, columns or both were scaled to one length.

    W <- (1 - lr wd) W - lr s(m, n) polar(R U C), R_i = 1 / sqrt(sum_j U_ij^2 + eps).
    U = mu B + (1-mu) G. C_j is the same for columns. R, C or both are applied.

    Args:
        params, lr, weight_decay, momentum, nesterov: as Muon; the defaults are Moonlight's.
        equilibrate: "row" (the paper's R), "column" (C) or "both" (RC, with both sums of U itself).
        norm_eps: added to the sums of squares.
        adjust_lr_fn: as Muon ("match_rms_adamw").
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    State: `momentum_buffer`; 4 bytes per parameter in float32.

    Source: arXiv:2603.28254; the defaults and eps could not be checked against it.
    """

    self_contained = True
    state_names = ("momentum_buffer",)
    rules: ClassVar[dict[str, Rule]] = {"equilibrate": one_of(*SIDES), "norm_eps": at_least(0.0)}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: Any = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        equilibrate: str = "row",
        norm_eps: float = 1e-8,
        adjust_lr_fn: str | None = "match_rms_adamw",
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            equilibrate=equilibrate, norm_eps=norm_eps, adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        dims, eps = SIDES[group["equilibrate"]], group["norm_eps"]
        return self.polar(Updates([equilibrated(u, dims, eps) for u in updates.stacks]), group)


def equilibrated(U: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Return R U C of a stack, in the dtype of U; U may be overwritten."""
    X = U.to(accumulator(U))
    squares = [torch.linalg.vector_norm(X, dim=d, keepdim=True).square() for d in dims]
    for s in squares:
        X.mul_(inverse(s, eps, "inside"))
    return X.to(U.dtype)
