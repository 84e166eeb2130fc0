"""The optimizer AdaMuon."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..ops import elementwise_moment_
from . import factored
from .norms import to_rms, to_signs
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import FLAG, Rule, at_least, one_of
from .state import Batch, Updates
from .tensors import numbers


class AdaMuon(Orthogonalizing):
    """Muon with Adam's second moment of the orthogonalized momentum, at an update RMS of 0.2.

    W <- (1 - lr wd) W - lr 0.2 sqrt(mn) N / |N|_F, N = O / (sqrt(V / (1-beta2^t)) + eps).
    O = polar(mu B + (1-mu) G), V <- beta2 V + (1-beta2) O^2, elementwise.

    Args:
        params, lr, weight_decay, momentum, nesterov: as Muon.
        beta2, norm_eps: decay rate of V; norm_eps is added to V's root, and to |N|_F.
        sign: orthogonalize the momentum's sign (the paper) instead of the momentum (the code).
        rescale: "rms", as published; "none": W <- W - lr N, the matrix-whitening study's AdaMuon,
            which has neither the rescaling nor a shape factor.
        moment: "elementwise"; "factored": V from decayed means of O^2 over rows and columns;
            "study": the same V times m / n, as in that study's code (it divides by the wrong
            length; its step is sqrt(n/m) times that of "factored", but for norm_eps).
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    The paper has no bias correction; the rescaling cancels it, but for eps.
    State: `momentum_buffer`, `second_moment`, `step`; 8 bytes per parameter in float32.
    Factored: `row_moment`, `column_moment` for `second_moment`; 4 bytes per parameter, row, column.

    Source: github.com/Chongjie-Si/AdaMuon at 3b84e031, arXiv:2507.11005; the study is
    arXiv:2510.25000.
    """

    state_names = ("momentum_buffer", "second_moment")
    self_contained = True
    counts_steps = True
    rules: ClassVar[dict[str, Rule]] = {"sign": FLAG, "norm_eps": at_least(0.0),
             "rescale": one_of("rms", "none"),
             "moment": one_of("elementwise", "factored", "study")}  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 0.02,
        weight_decay: Any = 0.01,
        momentum: float = 0.95,
        beta2: float = 0.999,
        *,
        nesterov: bool = True,
        norm_eps: float = 1e-8,
        sign: bool = False,
        rescale: str = "rms",
        moment: str = "elementwise",
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2,
            nesterov=nesterov, norm_eps=norm_eps, sign=sign, rescale=rescale, moment=moment,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["moment"] == "elementwise" else self.state_names[:1]

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {} if group["moment"] == "elementwise" else factored.shapes(x)

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        study = group["moment"] == "study" and group["rescale"] == "none"
        return math.sqrt(x.shape[-1] / x.shape[-2]) if study else 1.0

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        if group["sign"]:
            updates = to_signs(updates)
        factors = self.polar(updates, group)
        if group["moment"] != "elementwise":
            factors = factored.adapt_(factors, batch, group)
            return to_rms(factors, 0.2, group["norm_eps"]) if group["rescale"] == "rms" else factors
        beta2, eps = group["beta2"], group["norm_eps"]
        moments = batch.state["second_moment"]
        corrections = [(1 - beta2**t) ** -0.5 for t in batch.steps]
        norms = elementwise_moment_.unchecked(
            moments, factors.matrices, beta2, eps, numbers(corrections, moments[0].device)
        )
        factors = Updates(factors.stacks, norms)
        return to_rms(factors, 0.2, eps) if group["rescale"] == "rms" else factors
