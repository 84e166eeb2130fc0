"""Whitening by Newton's iteration for the inverse square root, and losses that train with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks as check

AXES = ("batch", "channel")


def iter_norm(Z: Tensor, steps: int = 4, axis: str = "batch") -> Tensor:
    """P X / sqrt(tr S): X centred, S = X X^T / (d - 1), P <- (3 P - P^3 S / tr S) / 2 from I.

    P tends to (S / tr S)^(-1/2). Four steps whiten large directions and leave small ones small, on
    purpose. Many more (15) amplify rounding errors where S has lower rank. Differentiable. Zero
    stays zero.

    Args:
        Z: (..., N, d), N samples of d features.
        steps: Newton steps.
        axis: "batch" centres rows and whitens the N x N Gram matrix of the samples (INTL's
            default). "channel" centres columns and whitens the d x d covariance of the features:
            X P / sqrt(tr S), S = X^T X / (N - 1).

    Returns: whitened Z. Cost: 4 N^2 d + 6 steps N^3 operations (for "channel" with N and d
    exchanged).

    Source: arXiv:1904.03441; arXiv:2305.16789 (github.com/winci-ai/INTL).
    """
    op = "iter_norm"
    check.tensor(op, "Z", Z, min_dim=2)
    check.integer(op, "steps", steps, 1)
    check.choice(op, "axis", axis, AXES)
    X = Z if axis == "batch" else Z.mT
    if X.shape[-1] < 2:
        raise ValueError(f"{op}: Z must have two entries to centre, got shape {check.shape(Z)}")
    X = X - X.mean(-1, keepdim=True)
    S = X @ X.mT / (X.shape[-1] - 1)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    trace = torch.where(trace == 0, 1.0, trace)
    S = S / trace
    P = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    for k in range(steps):
        P = 1.5 * P - 0.5 * ((P @ P @ P) @ S if k else S)
    out = (P @ X) * trace.rsqrt()
    return out if axis == "batch" else out.mT


class IterNorm(nn.Module):
    """Z -> `iter_norm`(Z, steps, axis): a layer without parameters, (..., N, d) to the same shape.

    Cost and gradient: those of `iter_norm`. Source: arXiv:1904.03441; arXiv:2305.16789.
    """

    def __init__(self, steps: int = 4, axis: str = "batch") -> None:
        super().__init__()
        check.integer("IterNorm", "steps", steps, 1)
        check.choice("IterNorm", "axis", axis, AXES)
        self.steps, self.axis = steps, axis

    def forward(self, Z: Tensor) -> Tensor:
        return iter_norm(Z, self.steps, self.axis)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, axis={self.axis}"


def trace_loss(Z: Tensor, axis: str = "batch") -> Tensor:
    """sum_i (var_i - 1)^2: the distance of whitened samples (or features) from variance 1.

    Args:
        Z: whitened, (N, d).
        axis: "batch" takes the variance of each sample over its features, "channel" that of each
            feature over the samples.

    Returns: a 0-d tensor, differentiable. Cost: two passes. Source: arXiv:2305.16789.
    """
    check.tensor("trace_loss", "Z", Z, min_dim=2)
    check.choice("trace_loss", "axis", axis, AXES)
    return (Z.var(-1 if axis == "batch" else -2) - 1).square().sum()


def intl_loss(
    views: Sequence[Tensor], weight: float | None = None, steps: int = 4, axis: str = "batch"
) -> Tensor:
    """mean over i > 0 of mean(2 - 2 cos(t_i, t_0)) + weight (trace_loss(t_i) + trace_loss(t_0)).

    t_i = iter_norm(views[i]) for two or more augmented views of one batch. No negative pairs are
    needed.

    Args:
        views: projections (N, d) of each view.
        weight: weight of the trace loss; None takes 0.01 (log2 N - 3), as published.
        steps, axis: as `iter_norm`.

    Returns: a 0-d tensor, differentiable. Cost: an `iter_norm` of every view.

    Source: arXiv:2305.16789 (github.com/winci-ai/INTL, methods/intl.py).
    """
    if len(views) < 2:
        raise ValueError(f"intl_loss: views must be two or more, got {len(views)}")
    t = [iter_norm(z, steps, axis) for z in views]
    for i, z in enumerate(t):
        check.equal_shape("intl_loss", f"views[{i}]", z, views[0].shape)
    weight = 0.01 * (math.log2(len(views[0])) - 3) if weight is None else weight
    traces = [trace_loss(z, axis) for z in t]
    terms = [
        (2 - 2 * F.cosine_similarity(t[i], t[0], dim=-1)).mean() + weight * (traces[i] + traces[0])
        for i in range(1, len(t))
    ]
    return torch.stack(terms).mean()
