"""The optimizer Dion2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..ops import accumulate_, row_moment_, take_rows_, update_rows_
from ..ops.steps import stacks_in_turn, work_parts
from .amp import Flags
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least, optional, part, scheduled
from .stacks import beside, write_beside_
from .state import Batch, Updates


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
        matrices = [by_rows(u, group) for u in updates.matrices]
        one, zero = (self.number(x, matrices[0].device) for x in (1.0, 0.0))
        torch._foreach_zero_(updates.stacks)
        for indices, K, X in self.used(batch, group):
            some = [matrices[i] for i in indices]
            update_rows_.unchecked(some, K, X, one, zero, [-1.0] * len(some))
        return updates

    def at_once(self, batch: Batch, group: dict[str, Any]) -> bool:
        """Update the rows K of the weights, without a matrix that is zero elsewhere."""
        if self.in_parts(group) or batch.mantissas or group["stochastic_rounding"]:
            return False
        lr, _, weight_decay, factors = self.scheduled(batch, group)
        for indices, K, X in self.used(batch, group):
            some = [by_rows(batch.params[i], group) for i in indices]
            update_rows_.unchecked(some, K, X, lr, weight_decay, [factors[i] for i in indices])
        return True

    def used(
        self, batch: Batch, group: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Update M; yield (indices, rows K, polar(B_K)) of the matrices of one part at a time.

        The factors lie in the part's work buffer, so they are valid until the next part.
        """
        residuals = [by_rows(M, group) for M in batch.state["residual_buffer"]]
        grads = [by_rows(g, group) for g in batch.grads]
        mu = self.momentum(group, residuals[0].device)
        by_part = work_parts(residuals)
        rooms = [M.narrow(-2, 0, math.ceil(group["fraction"] * M.shape[-2])) for M in residuals]
        for chunk, stacks in zip(by_part, stacks_in_turn(rooms, by_part), strict=True):
            indices = [i for some in chunk for i in some]
            B, G = [residuals[i] for i in indices], [grads[i] for i in indices]
            sizes = [
                b.new_empty((len(some), *b.shape[:-1]), dtype=torch.float64)
                for some, b in ((some, residuals[some[0]]) for some in chunk)
            ]
            accumulate_.unchecked(B, G, unstacked(sizes))
            pairs = zip(sizes, stacks, strict=True)
            places = [z.topk(X.shape[-2], -1).indices for z, X in pairs]
            K, largest = unstacked(places), Updates(stacks)
            take_rows_.unchecked(B, K, mu, largest.matrices)
            factors = self.polar(largest, group)
            if group["beta2"] is not None:
                normalize_(factors, places, batch.part(indices), group)
            yield indices, K, factors.matrices


def by_rows(x: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a view of x that has the lines of which some are used as its rows."""
    return x.mT if x.shape[-2] > x.shape[-1] and group["beta2"] is None else x


def unstacked(stacks: list[Tensor]) -> list[Tensor]:
    return [x for stack in stacks for x in stack.unbind()]


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
