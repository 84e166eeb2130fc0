"""The optimizer NorMuon."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed.spread import Part, Spread, Sums, Travel
from ..ops import column_moment_, normuon_step_, row_moment_
from ..ops.normalize import inverse
from ..polar import Polynomial
from .amp import flags_of
from .norms import to_rms
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import Rule, at_least, one_of
from .state import Batch, Updates


class NorMuon(Orthogonalizing):
    """Muon whose rows (output neurons) are normalized by their running mean square.

    W <- (1 - lr wd) W - lr s(m, n) N, N = O / (sqrt(v) + eps) at the norm of O.
    O = polar(mu B + (1-mu) G), v_i <- beta2 v_i + (1-beta2) mean_j O_ij^2, one number per row.

    Args:
        params, lr, weight_decay, momentum, nesterov, adjust_lr_fn: as Muon.
        beta2, norm_eps: decay rate of v; norm_eps is added to sqrt(v).
        axis: "row", as published, or "long": rows of tall and square matrices, columns of wide
            ones (NVIDIA Emerging-Optimizers).
        rescale: "norm" keeps |O|_F and applies `adjust_lr_fn` (the authors' code); "rms" makes the
            RMS of the update 0.2 (the paper's 0.2 sqrt(mn) / |N|_F) and leaves adjust_lr_fn unused.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    State: `momentum_buffer`, `row_moment` (one number per row, or per column of wide matrices with
    axis="long"); 4 bytes per parameter and 4 per row in float32. v is not bias-corrected, since the
    rescaling would cancel that. Convolutions are out x rest here; the authors' rows run along the
    last kernel axis.

    Source: github.com/zichongli5/NorMuon at d45c9a42; arXiv:2510.05491.
    """

    state_names = ("momentum_buffer",)
    self_contained = True
    rules: ClassVar[dict[str, Rule]] = {"axis": one_of("row", "long"),
             "rescale": one_of("norm", "rms"), "norm_eps": at_least(0.0)}  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 0.02,
        weight_decay: Any = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        *,
        nesterov: bool = True,
        norm_eps: float = 1e-10,
        axis: str = "row",
        rescale: str = "norm",
        adjust_lr_fn: str | None = None,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2,
            nesterov=nesterov, norm_eps=norm_eps, axis=axis, rescale=rescale,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"row_moment": (*x.shape[:-2], 1, x.shape[-1]) if self.columns(x, group)
                else (*x.shape[:-1], 1)}  # fmt: skip

    def columns(self, x: Tensor, group: dict[str, Any]) -> bool:
        return group["axis"] == "long" and x.shape[-2] < x.shape[-1]

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        factors = self.polar(updates, group)
        sides: tuple[list[Any], list[Any]] = ([], [])
        for pair in zip(batch.state["row_moment"], factors.matrices, strict=True):
            sides[int(self.columns(pair[1], group))].append(pair)  # for torch 2.11
        keep = group["rescale"] == "norm"
        for op, pairs in zip((row_moment_, column_moment_), sides, strict=True):
            if pairs:
                moments, matrices = map(list, zip(*pairs, strict=True))
                op.unchecked(moments, matrices, group["beta2"], group["norm_eps"], "outside", keep)
        return factors if keep else to_rms(factors, 0.2)

    def at_once(self, batch: Batch, group: dict[str, Any]) -> bool:
        flags = flags_of(self, batch.params[0].device)
        other = group["axis"] != "row" or group["rescale"] != "norm" or self.in_parts(group)
        other = other or group["stochastic_rounding"]
        if other or batch.mantissas or any(flag is not None for flag in flags):
            return False
        normuon_step_.unchecked(
            batch.params, batch.grads, batch.state["momentum_buffer"], batch.state["row_moment"],
            *self.scheduled(batch, group), group["beta2"], group["norm_eps"],
            *self.iteration(group),
        )  # fmt: skip
        return True

    def polar_first(self, p: Tensor, group: dict[str, Any]) -> Polynomial:
        return self.polynomial(group)

    def sums(self, p: Tensor, group: dict[str, Any], step: int) -> Sums | None:
        found, lines = super().sums(p, group, step), p.shape[1 if self.columns(p, group) else 0]
        return found and found._replace(bytes=(*found.bytes, 2 * 8 * lines))

    def after_polar(self, parts: list[Part], spread: Spread, group: dict[str, Any]) -> Travel[None]:
        """Normalize this rank's parts, with one sum over ranks of squares of lines and of moments.

        Ranks keep parts of the moments.
        """
        squares = []
        for x in parts:
            along, across = self.axes(x, group)
            square = torch.zeros_like(x.state["row_moment"], dtype=torch.float64)
            mine = x.block.double().square().sum(along, keepdim=True)
            square.narrow(across, *x.box[across]).copy_(mine)
            squares.append(square)
        moments = [x.state["row_moment"].double() for x in parts]
        sums = yield from spread.sums([*squares, *moments])
        beta2, keep = group["beta2"], group["rescale"] == "norm"
        for x, square, old in zip(parts, sums[: len(parts)], sums[len(parts) :], strict=True):
            along, across = self.axes(x, group)
            v = beta2 * old + (1 - beta2) * square / x.shape[along]
            x.state["row_moment"].copy_(v)
            lines = inverse(v, group["norm_eps"], "outside")
            after = (square * lines * lines).sum()
            before = square.sum() if keep else 0.2**2 * math.prod(x.shape)
            lines = lines * torch.where(after == 0, 0.0, (before / after).sqrt())
            x.block.mul_(lines.narrow(across, *x.box[across]))

    def axes(self, x: Part, group: dict[str, Any]) -> tuple[int, int]:
        """Return (dimension along which squares are added up, the other one)."""
        whole = torch.empty(x.shape, device="meta")
        return (-2, -1) if self.columns(whole, group) else (-1, -2)

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        return super().factor(x, owner, group) if group["rescale"] == "norm" else 1.0
