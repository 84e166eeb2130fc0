"""The optimizer Dion2."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..ops import decayed_update_, row_moment_
from ..ops.normalize import accumulator
from .amp import Flags
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least, optional, part, scheduled
from .stacks import beside, write_beside_
from .state import Batch, Updates

PIECE = 2**17  # elements whose absolute values are taken at a time


class Dion2(Orthogonalizing):
    """Muon on the largest quarter of the rows (or columns) of accumulated gradients.

    W_K <- W_K - lr s(m, n) polar(B_K), B = M + G, K the rows of largest |B_i|_1.
    M <- B, but mu B in the rows K: error feedback keeps what was not used. For tall matrices K are
    columns.

    Args:
        params, lr, weight_decay, adjust_lr_fn ("spectral"): as Muon; all of W decays.
        momentum: mu, the share of used rows that stays in M.
        fraction: share of the short side that is used; its number of rows is rounded up.
        beta2: None, or a decay rate, which makes it NorDion2: rows of O = polar(B_K) are divided by
            sqrt(v_K) + norm_eps, and O keeps its norm. v_K <- beta2 v_K + (1-beta2) mean_j O_ij^2.
            K are then rows, whatever the shape.
        norm_eps: added to sqrt(v_K).
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz, here
            with ns_coefficients="polar_express". `heavy_ball` has no effect.

    The authors orthogonalize in bfloat16, and select along the dimension that is sharded.
    State: `residual_buffer` (M), and `row_moment` with beta2; 4 bytes per parameter, and 4 per row
    with beta2, in float32.

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
        weight_decay: Any = 0.01,
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

    def directed(
        self,
        batch: Batch,
        stacks: list[Tensor],
        mu: Tensor | None,
        group: dict[str, Any],
        flags: Flags,
    ) -> Updates:
        """Call `direction` without copies of the gradients, which only telemetry needs."""
        if self.probe(group):
            return super().directed(batch, stacks, mu, group, flags)
        return self.direction(Updates(stacks), batch, group)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        residuals = batch.state["residual_buffer"]
        one, zero = (self.number(x, residuals[0].device) for x in (1.0, 0.0))
        decayed_update_.unchecked(residuals, batch.grads, one, zero, [-1.0] * len(residuals))
        torch._foreach_copy_(updates.matrices, residuals)
        places = [largest(B, group) for B in updates.stacks]
        pairs = list(zip(updates.stacks, places, strict=True))
        used = Updates([taken(B, dim, K) for B, (dim, K) in pairs])
        keep_(residuals, pairs, self.momentum(group, residuals[0].device))
        factors = self.polar(used, group)
        if group["beta2"] is not None:
            normalize_(factors, [K for _, K in places], batch, group)
        for (B, (dim, K)), X in zip(pairs, factors.stacks, strict=True):
            put_(B.zero_(), dim, K, X)
        return updates


def largest(B: Tensor, group: dict[str, Any]) -> tuple[int, Tensor]:
    """Return (dimension, K): select lines along it, those in K (..., count), the largest by |.|_1.

    The dimension is -2 for rows, -1 for columns.
    """
    m, n = B.shape[-2:]
    dim, length = (-2, m) if m <= n or group["beta2"] is not None else (-1, n)
    count = min(length, math.ceil(group["fraction"] * length))
    # torch.linalg.vector_norm makes no |B|, but takes 1.5 ms instead of 0.6 (llama-3m, 2026-11).
    # Small pieces of |B| stay in the cache; new memory for all of it costs as much as the sums.
    few = max(1, PIECE // max(1, m * n))
    sizes = [b.abs().sum(-3 - dim, dtype=accumulator(B)) for b in B.split(few)]
    return dim, torch.cat(sizes).topk(count, -1).indices


def taken(B: Tensor, dim: int, K: Tensor) -> Tensor:
    """Return the lines K of every matrix; not by `gather` for rows: it takes ten times as long."""
    if dim == -2:
        return B.flatten(0, -2).index_select(0, flat(B, K)).view(*K.shape, B.shape[-1])
    return B.gather(dim, entries(B, K))


def put_(B: Tensor, dim: int, K: Tensor, X: Tensor) -> None:
    """Write X into the lines K of every matrix: the reverse of `taken`."""
    if dim == -2:
        B.flatten(0, -2).index_copy_(0, flat(B, K), X.flatten(0, -2))
    else:
        B.scatter_(dim, entries(B, K), X)


def flat(B: Tensor, K: Tensor) -> Tensor:
    """Return the indices of rows K of every matrix among the rows of the whole stack, 1-D."""
    firsts = torch.arange(K.shape[:-1].numel(), device=K.device) * B.shape[-2]
    return (K + firsts.view(*K.shape[:-1], 1)).flatten()


def entries(B: Tensor, K: Tensor) -> Tensor:
    """Return K, columns of every matrix, expanded to the shape of an index of `gather`."""
    return K.unsqueeze(-2).expand(*B.shape[:-1], K.shape[-1])


def keep_(
    residuals: list[Tensor], pairs: list[tuple[Tensor, tuple[int, Tensor]]], mu: Tensor
) -> None:
    """Multiply the used lines of the residuals by mu, and keep the others."""
    kept: list[Tensor] = []
    for B, (dim, K) in pairs:
        ones = torch.ones(*B.shape[:-2], B.shape[dim], dtype=accumulator(B), device=B.device)
        factors = ones.scatter_(-1, K, mu.to(ones.dtype).expand(K.shape))
        kept += factors.unsqueeze(-3 - dim).unbind()
    torch._foreach_mul_(residuals, kept)


def normalize_(factors: Updates, places: list[Tensor], batch: Batch, group: dict[str, Any]) -> None:
    """Divide rows by their running root mean squares; each matrix keeps its norm.

    The moments of the rows in `places` are updated.
    """
    rows = [K.unsqueeze(-1) for K in places]
    stacks = beside(factors, batch.state["row_moment"])
    moments = [v.gather(-2, K) for v, K in zip(stacks, rows, strict=True)]
    row_moment_.unchecked(
        moments, factors.stacks, group["beta2"], group["norm_eps"], "outside", True
    )
    new = [v.scatter(-2, *pair) for v, *pair in zip(stacks, rows, moments, strict=True)]
    write_beside_(batch.state["row_moment"], new)
