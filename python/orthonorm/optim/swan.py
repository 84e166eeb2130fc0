"""The optimizer SWAN."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops import magnitude, row_normalize
from ..ops.normalize import accumulator
from .norms import multiply_each_
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import FLAG, Rule, at_least
from .state import Batch, Updates


class SWAN(Orthogonalizing):
    """Gradients normalized by row, then whitened: an optimizer without any state.

    W <- (1 - lr wd) W - lr s(m, n) polar(Z), Z_i = (G_i - mean G_i) / (std G_i + eps).
    Rows are centred and standardized, then the matrix is orthogonalized.

    Args:
        params, lr, weight_decay: as Muon.
        rescale: give the factor the Frobenius norm of Z, an option of the paper.
        norm_eps: added to the standard deviation (over n, not n - 1) of a row.
        adjust_lr_fn: as Muon ("none").
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz, here
            with ns_coefficients="polar_express", since the paper iterates until the result is
            exact.

    A matrix of one column does not move: each of its rows is its own mean.
    State: none.

    Source: arXiv:2412.13148; the defaults of lr and eps are our choice.
    """

    self_contained = True
    rules: ClassVar[dict[str, Rule]] = {"rescale": FLAG, "norm_eps": at_least(0.0)}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: Any = 0.0,
        *,
        rescale: bool = False,
        norm_eps: float = 1e-8,
        adjust_lr_fn: str | None = "none",
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, ns_coefficients="polar_express", ns_steps=None, lr=lr,
            weight_decay=weight_decay, rescale=rescale, norm_eps=norm_eps,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        Z = Updates([standardized(u, group["norm_eps"]) for u in updates.stacks])
        factors = self.polar(Z, group, keep=group["rescale"])
        if not group["rescale"]:
            return factors
        wanted, has = magnitude.unchecked(Z.stacks), magnitude.unchecked(factors.stacks)
        return multiply_each_(factors, torch.where(has == 0, 0.0, wanted / has))


def standardized(G: Tensor, eps: float) -> Tensor:
    """Return Z of a stack of gradients, in the dtype of G; G may be overwritten."""
    X = G.to(accumulator(G))
    X.sub_(X.mean(-1, keepdim=True))
    return row_normalize.unchecked(X, X.shape[-1] ** -0.5, eps).to(G.dtype)
