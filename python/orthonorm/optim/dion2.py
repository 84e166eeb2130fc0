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

PIECE = 2**17  # elements


class Dion2(Orthogonalizing):
    """Muon on the largest quarter of the rows (or columns) of accumulated gradients.

    W_K <- W_K - lr s(m, n) polar(B_K), B = M + G, K the rows of largest |B_i|_1.
    M <- B, but mu B in the rows K: error feedback keeps what was not used. Of tall matrices,
    columns.

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

    def directed(
        self,
        batch: Batch,
        stacks: list[Tensor],
        mu: Tensor | None,
        group: dict[str, Any],
        flags: Flags,
    ) -> Updates:
        """`direction` takes the gradients of the batch: only telemetry asks for copies."""
        if self.probe(group):
            return super().directed(batch, stacks, mu, group, flags)
        return self.direction(Updates(stacks), batch, group)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        residuals = batch.state["residual_buffer"]
        one = torch.ones((), dtype=torch.float64, device=residuals[0].device)
        decayed_update_.unchecked(residuals, batch.grads, one, 0.0, [-1.0] * len(residuals))
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
    """The dimension of a stack that is selected from, and which of its lines, (..., count)."""
    m, n = B.shape[-2:]
    dim, length = (-2, m) if m <= n or group["beta2"] is not None else (-1, n)
    count = min(length, math.ceil(group["fraction"] * length))
    # torch.linalg.vector_norm would need no |B|, but 1.5 ms for 0.6 (llama-3m, 2026-11); a |B| that
    # stays in the cache is no new memory every step, which costs as much as the sums
    few = max(1, PIECE // max(1, m * n))
    sizes = [b.abs().sum(-3 - dim, dtype=accumulator(B)) for b in B.split(few)]
    return dim, torch.cat(sizes).topk(count, -1).indices


def taken(B: Tensor, dim: int, K: Tensor) -> Tensor:
    """The lines K of every matrix; rows as such, for which `gather` takes ten times as long."""
    if dim == -2:
        return B.flatten(0, -2).index_select(0, flat(B, K)).view(*K.shape, B.shape[-1])
    return B.gather(dim, entries(B, K))


def put_(B: Tensor, dim: int, K: Tensor, X: Tensor) -> None:
    """The reverse of `taken`."""
    if dim == -2:
        B.flatten(0, -2).index_copy_(0, flat(B, K), X.flatten(0, -2))
    else:
        B.scatter_(dim, entries(B, K), X)


def flat(B: Tensor, K: Tensor) -> Tensor:
    """Rows K of every matrix as rows of the whole stack."""
    firsts = torch.arange(K.shape[:-1].numel(), device=K.device) * B.shape[-2]
    return (K + firsts.view(*K.shape[:-1], 1)).flatten()


def entries(B: Tensor, K: Tensor) -> Tensor:
    """Columns K of every matrix as `gather` wants them."""
    return K.unsqueeze(-2).expand(*B.shape[:-1], K.shape[-1])


def keep_(
    residuals: list[Tensor], pairs: list[tuple[Tensor, tuple[int, Tensor]]], mu: Tensor
) -> None:
    """mu times what was used of the residuals, all of the rest."""
    kept: list[Tensor] = []
    for B, (dim, K) in pairs:
        ones = torch.ones(*B.shape[:-2], B.shape[dim], dtype=accumulator(B), device=B.device)
        factors = ones.scatter_(-1, K, mu.to(ones.dtype).expand(K.shape))
        kept += factors.unsqueeze(-3 - dim).unbind()
    torch._foreach_mul_(residuals, kept)


def normalize_(factors: Updates, places: list[Tensor], batch: Batch, group: dict[str, Any]) -> None:
    """Rows over their running root mean squares, at the norms they had together."""
    rows = [K.unsqueeze(-1) for K in places]
    stacks = beside(factors, batch.state["row_moment"])
    moments = [v.gather(-2, K) for v, K in zip(stacks, rows, strict=True)]
    row_moment_.unchecked(
        moments, factors.stacks, group["beta2"], group["norm_eps"], "outside", True
    )
    new = [v.scatter(-2, *pair) for v, *pair in zip(stacks, rows, moments, strict=True)]
    write_beside_(batch.state["row_moment"], new)
