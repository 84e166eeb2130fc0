"""Independent implementations to hold optimizers against, written from the papers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class TrustedConda:
    """Conda as published: momentum not rotated, an SVD at each refresh, three products."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_proj_gap: int = 2000,
        scale: float = 0.25,
    ) -> None:
        self.params, self.lr, self.betas, self.eps = list(params), lr, betas, eps
        self.weight_decay, self.gap, self.scale = weight_decay, update_proj_gap, scale
        self.M = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]
        self.Q: list[Tensor] = [torch.empty(0)] * len(self.params)
        self.s = 0

    @torch.no_grad()
    def step(self) -> None:
        b1, b2 = self.betas
        for i, p in enumerate(self.params):
            M, v, G = self.M[i], self.v[i], p.grad
            M.mul_(b1).add_(G, alpha=1 - b1)
            tall = p.shape[0] >= p.shape[1]
            if self.s % self.gap == 0:
                U, _, Vh = torch.linalg.svd(M, full_matrices=False)
                self.Q[i] = Vh.mT if tall else U
            Q = self.Q[i]
            g, m = (G @ Q, M @ Q) if tall else (Q.mT @ G, Q.mT @ M)
            v.mul_(b2).add_(g * g, alpha=1 - b2)
            t = self.s + 1
            N = m / (v.sqrt() + self.eps)
            Z = N @ Q.mT if tall else Q @ N
            p.sub_(Z, alpha=self.lr * math.sqrt(1 - b2**t) / (1 - b1**t) * self.scale)
            if self.weight_decay > 0:
                p.sub_(p, alpha=self.lr * self.weight_decay)
        self.s += 1


class TrustedMuon:
    """Muon in the parameters' own dtype: lerp momentum, direct quintic iteration on X / |X|_F."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str | None = None,
    ) -> None:
        self.params, self.lr, self.weight_decay = list(params), lr, weight_decay
        self.momentum, self.nesterov, self.adjust = momentum, nesterov, adjust_lr_fn
        self.B = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, B in zip(self.params, self.B, strict=True):
            B.lerp_(p.grad, 1 - self.momentum)
            X = p.grad.lerp(B, self.momentum) if self.nesterov else B.clone()
            tall = p.shape[0] > p.shape[1]
            X = X.mT if tall else X
            X = X / X.norm().clamp(min=1e-300)
            for _ in range(5):
                A = X @ X.mT
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            m, n = p.shape
            factor = (
                0.2 * math.sqrt(max(m, n))
                if self.adjust == "match_rms_adamw"
                else math.sqrt(max(1, m / n))
            )
            p.mul_(1 - self.lr * self.weight_decay)
            p.sub_(X.mT if tall else X, alpha=self.lr * factor)
