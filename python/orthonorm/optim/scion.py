"""The optimizers Scion and ScionLight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops import column_normalize, row_normalize
from ..polar import Polynomial
from .norms import to_signs
from .orthogonal import NEWTON_SCHULZ, NewtonSchulz, Orthogonalizing
from .settings import FLAG, Rule, at_least, one_of, scheduled
from .state import Batch, Updates
from .tensors import local
from .views import flattens

# Disco's row norms -> p in D_i / (|D_i| + norm_eps) n^p
ROWS = {"embed_linear": 1.0, "embed_sqrt": 0.5, "unembed_linear": -1.0, "unembed_sqrt": -0.5}
NORMS = ("auto", "spectral", "spectral_conv", "column", "row", "sign", "bias_rms", *ROWS)
NORMALIZED = {"spectral": True, "spectral_conv": True, "column": False, "row": True, "sign": True}


class Scion(Orthogonalizing):
    """Linear minimization over norm balls, a norm per group; for parameters of any shape.

    W <- (1 - lr) W - lr scale LMO(D), D <- (1-alpha) D + alpha G.
    LMO(D) is the element of norm 1 for which <D, LMO(D)> is largest; each group names its norm.

    Args:
        params: parameters, named parameters or param groups with their `norm` and `scale`.
        lr: learning rate, a number or a one-element tensor; W shrinks by 1 - lr too.
        momentum: alpha, one minus the usual factor; 1 keeps no average.
        norm: the LMO of an m x n matrix D; two forms are "normalized; not normalized":
            "spectral": polar(D) sqrt(m/n); polar(D) sqrt(m).
            "spectral_conv": the same for weights out x in x k..., m = out, n = in, over prod(k).
            "column": D_:j / (n r_j + norm_eps); D_:j / (r_j + norm_eps), r_j the column's RMS.
            "row": D_i / (sqrt(n) |D_i| + norm_eps); D_i / (|D_i| + norm_eps).
            "sign": sign(D) / n; sign(D).
            "bias_rms": D_:j / (r_j + norm_eps); for vectors D / (RMS + norm_eps).
            "embed_linear", "embed_sqrt", "unembed_linear", "unembed_sqrt" (Disco):
            D_i / (|D_i| + norm_eps) times n, sqrt(n), 1/n, 1/sqrt(n).
            "auto": "spectral_conv" for convolutions, "spectral" for matrices, else "bias_rms".
        scale: radius of the ball.
        normalized: take the first of the two forms. None is the authors' default: True, but False
            for "column".
        transpose: take the LMO of D^T, as "column" needs for embeddings stored vocabulary x width
            (views.py).
        largest: raise spectral factors below 1 to 1 (before prod(k) divides them).
        unconstrained: do not shrink W.
        norm_eps: as in the norms.
        **common: options of every optimizer (settings.Common) and of orthogonal.NewtonSchulz.

    Disco's "image_spectral" is "spectral" with largest=True, its "conv_spectral" "spectral_conv";
    its default norm_eps is 1e-20. Vectors, which it lifts to diagonal matrices, are "bias_rms"
    here. The authors initialize every weight on its ball; the optimizer leaves that to the model.
    State: `momentum_buffer`, 4 bytes per parameter in float32; none while alpha is 1.

    Source: github.com/LIONS-EPFL/scion at f58a393e, arXiv:2502.07529; github.com/rakkit/disco at
    d18ea040.
    """

    state_names = ("momentum_buffer",)
    min_dim = 0
    self_contained = True
    rules: ClassVar[dict[str, Rule]] = {
        "momentum": scheduled(0.0, 1.0), "norm": one_of(*NORMS),
        "scale": at_least(0.0), "normalized": one_of(None, True, False),
        "largest": FLAG, "unconstrained": FLAG, "norm_eps": at_least(0.0),
    }  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: Any = 1.0,
        norm: str = "auto",
        scale: float = 1.0,
        unconstrained: bool = False,
        *,
        normalized: bool | None = None,
        transpose: bool = False,
        largest: bool = False,
        norm_eps: float = 1e-8,
        **common: Unpack[NewtonSchulz],
    ) -> None:
        settings = dict(
            NEWTON_SCHULZ, lr=lr, momentum=momentum, norm=norm, scale=scale,
            unconstrained=unconstrained, normalized=normalized, transpose=transpose,
            largest=largest, norm_eps=norm_eps,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        alpha = group["momentum"]
        return () if not isinstance(alpha, Tensor) and alpha == 1 else self.state_names

    def momentum(self, group: dict[str, Any], device: torch.device) -> Tensor:
        return 1.0 - self.scalar(group, "momentum", device)

    def weight_decay(self, group: dict[str, Any], device: torch.device) -> Tensor:
        return self.number(0.0 if group["unconstrained"] else 1.0, device)

    def alike(self, p: Tensor, group: dict[str, Any]) -> Any:
        return norm_of(p, group)

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        norm = norm_of(batch.owners[0], group)
        if norm.startswith("spectral"):
            return self.polar(updates, group)
        if norm == "sign":
            return to_signs(updates)
        return Updates([lines(u, norm, group) for u in updates.stacks])

    def iterates(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        return norm_of(p, group).startswith("spectral")

    def polar_first(self, p: Tensor, group: dict[str, Any]) -> Polynomial | None:
        return self.polynomial(group) if self.iterates(p, group) else None

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        norm, (m, n) = norm_of(owner, group), x.shape[-2:]
        size = 1.0
        if norm == "sign":
            size = 1.0 / n if normalized(norm, group) else 1.0
        elif norm.startswith("spectral"):
            taps = math.prod(owner.shape[2:]) if norm == "spectral_conv" else 1
            size = math.sqrt(m / (n / taps)) if normalized(norm, group) else math.sqrt(m)
            size = (max(1.0, size) if group["largest"] else size) / taps
        elif norm in ROWS:
            size = n ** ROWS[norm]
        return group["scale"] * size


def norm_of(owner: Tensor, group: Mapping[str, Any]) -> str:
    if group["norm"] != "auto":
        return group["norm"]
    if owner.dim() < 2:
        return "bias_rms"
    return "spectral_conv" if flattens(owner.shape, group) else "spectral"


def normalized(norm: str, group: dict[str, Any]) -> bool:
    return NORMALIZED[norm] if group["normalized"] is None else group["normalized"]


def lines(D: Tensor, norm: str, group: dict[str, Any]) -> Tensor:
    """Return the LMO of D for norms of rows or columns."""
    m, n = D.shape[-2:]
    eps = group["norm_eps"]
    if norm == "row" or norm in ROWS:
        full = norm == "row" and normalized(norm, group)
        return row_normalize.unchecked(D, math.sqrt(n) if full else 1.0, eps)
    full = norm == "column" and normalized(norm, group)
    return column_normalize.unchecked(D, (n if full else 1.0) / math.sqrt(m), eps)


class ScionLight(Scion):
    """Scion with its average in the gradient itself: D = G, then G <- (1-alpha) G. No state at all.

    Do not call `zero_grad`: `backward` adds to the gradient that the step leaves. No other
    optimizer here writes gradients. Since they are its state, nothing else may rewrite them: use
    neither `clip_grad_norm_` nor GradScaler, with `fused=True` or without it. A scaler would divide
    what a step left by its scale again, and find an inf in it at every later step.

    D is sum_k (1-alpha)^k G_{t-k}, which is 1/alpha times Scion's average: the same step but for
    eps. A gradient that `nonfinite` skips stays in `.grad` until it is set to None. Arguments are
    Scion's.

    Source: as Scion's.
    """

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ()

    def finish(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [local(p.grad) for p in params]
        torch._foreach_mul_(grads, self.momentum(group, grads[0].device))
