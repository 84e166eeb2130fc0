"""Dion2: W_K <- W_K - lr s(m, n) polar(B_K), B = M + G, K the rows of largest |B_i|_1.

M <- B, but mu B in the rows K: error feedback keeps what was not used. Of tall matrices, columns.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..ops import row_moment_
from ..ops.normalize import accumulator
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least, optional, part, scheduled
from .stacks import beside, write_beside_
from .state import Batch, Updates


class Dion2(Orthogonalizing):
    """Muon on the largest quarter of the rows (or columns) of accumulated gradients.

    Args:
        params, lr, weight_decay, adjust_lr_fn ("spectral"): as Muon; all of W decays.
        momentum: mu, what stays of the rows that were used.
        fraction: of the short side that is used, rounded up.
        beta2: None, or NorDion2: the rows of O = polar(B_K) over sqrt(v_K) + norm_eps at the norm
            of O, v_K <- beta2 v_K + (1-beta2) mean_j O_ij^2; rows then, whatever the shape.
        norm_eps: as above.
        **common: what every optimizer takes (settings.Common), and orthogonal.NewtonSchulz, here
            with ns_coefficients="polar_express". `heavy_ball` has no meaning.

    The authors orthogonalize in bfloat16, and select along the dimension that is sharded.
    State: `residual_buffer` (M), with beta2 `row_moment`; 4 bytes per parameter (and 4 per row) in
    float32.

    Source: github.com/microsoft/dion, dion2.py at 00c2bc1b and nordion2.py at 2e9df450.
    """

    state_names = ("residual_buffer",)
    rules: ClassVar[dict[str, Rule]] = {
        "momentum": scheduled(0.0, 1.0), "fraction": part, "beta2": optional(check.fraction),
        "norm_eps": at_least(0.0),
    }  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 0.01,
        weight_decay: float = 0.01,
        momentum: Any = 0.95,
        fraction: float = 0.25,
        *,
        beta2: float | None = None,
        norm_eps: float = 1e-8,
        adjust_lr_fn: str | None = "spectral",
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, ns_coefficients="polar_express", lr=lr, weight_decay=weight_decay,
            momentum=momentum, fraction=fraction, beta2=beta2, norm_eps=norm_eps,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {} if group["beta2"] is None else {"row_moment": (*x.shape[:-1], 1)}

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        matrices, residuals = updates.matrices, batch.state["residual_buffer"]
        mu = self.momentum(group, residuals[0].device)
        torch._foreach_add_(matrices, residuals)
        places = [largest(B, group) for B in updates.stacks]
        pairs = zip(updates.stacks, places, strict=True)
        used = Updates([B.gather(dim, K) for B, (dim, K) in pairs])
        factors = self.polar(used, group)
        for B, S, (dim, K) in zip(updates.stacks, used.stacks, places, strict=True):
            B.scatter_(dim, K, S * mu)
        torch._foreach_copy_(residuals, matrices)
        if group["beta2"] is not None:
            normalize_(factors, [K for _, K in places], batch, group)
        for B, X, (dim, K) in zip(updates.stacks, factors.stacks, places, strict=True):
            B.zero_().scatter_(dim, K, X)
        return updates


def largest(B: Tensor, group: dict[str, Any]) -> tuple[int, Tensor]:
    """The dimension of a stack that is selected from, and for `gather` the entries of its part."""
    m, n = B.shape[-2:]
    dim, length = (-2, m) if m <= n or group["beta2"] is not None else (-1, n)
    count = min(length, math.ceil(group["fraction"] * length))
    # torch.linalg.vector_norm would need no |B|, but 1.5 ms for 0.6 (llama-3m, 2026-11)
    sizes = B.abs().sum(-3 - dim, keepdim=True, dtype=accumulator(B))
    places = sizes.topk(count, dim).indices
    return dim, places.expand(*B.shape[:-2], *((count, n) if dim == -2 else (m, count)))


def normalize_(factors: Updates, places: list[Tensor], batch: Batch, group: dict[str, Any]) -> None:
    """Rows over their running root mean squares, at the norms they had together."""
    rows = [K[..., :1] for K in places]
    stacks = beside(factors, batch.state["row_moment"])
    moments = [v.gather(-2, K) for v, K in zip(stacks, rows, strict=True)]
    row_moment_.overload(
        moments, factors.stacks, group["beta2"], group["norm_eps"], "outside", True
    )
    new = [v.scatter(-2, *pair) for v, *pair in zip(stacks, rows, moments, strict=True)]
    write_beside_(batch.state["row_moment"], new)
