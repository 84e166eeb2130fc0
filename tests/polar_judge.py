"""What a polar factor is held against: the exact polynomial, and the plain iteration's error.

The exact result is computed here, in float64, from the triples alone (for float64 results in
NumPy's longdouble). What rounding may add is measured, not chosen: err(ours in p) <= 2 err(plain
torch in p), the plain iteration being that of torch.optim.Muon, in the same form and with the same
restarts, started from the input that float64 scaled and rounded once (for float64 results from
X / X.norm(): the polynomials multiply an error of the norm by up to 150).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from orthonorm.coefficients import COEFFICIENTS, Coefficients, default_restarts
from torch import Tensor

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
SETS = pytest.mark.parametrize("c", COEFFICIENTS.values(), ids=lambda c: c.name)
Triples = Sequence[tuple[float, float, float]]


# ---- what is right, and what plain torch makes of it ---------------------------------------------
def scaled(X: Any, c: Coefficients, scale: str = "", eps: float = 0.0) -> Any:
    """X (an array, float64 or longdouble) over the norm that `scale` names."""
    scale, A = scale or c.prescale, X @ X.T
    if scale == "none":
        return X / c.safety
    if scale == "aol":
        size = np.sqrt(np.abs(A).sum(-1, keepdims=True))
    elif scale == "schatten4":
        size = np.sqrt(np.sqrt((A * A).sum()))
    else:
        size = np.sqrt((X * X).sum())
    return X / (np.maximum(size, eps or 5e-324) * c.safety)


def exact_direct(Y: Any, triples: Triples) -> Any:
    """Textbook, on the wide side, in the type of the array."""
    Y = Y if Y.shape[0] <= Y.shape[1] else Y.T
    for a, b, c in triples:
        A = Y @ Y.T
        Y = a * Y + (b * A + c * (A @ A)) @ Y
    return Y


def plain_direct(Y: Tensor, triples: Triples) -> Tensor:
    Y = Y if Y.shape[0] <= Y.shape[1] else Y.T
    for a, b, c in triples:
        A = Y @ Y.T
        Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
    return Y


def plain_gram(Y: Tensor, triples: Triples, restarts: Sequence[int]) -> Tensor:
    Y = Y if Y.shape[0] <= Y.shape[1] else Y.T
    identity = torch.eye(len(Y), dtype=Y.dtype)
    R, Q = Y @ Y.T, identity
    for t, (a, b, c) in enumerate(triples):
        if t in restarts:
            Y = Q @ Y
            R, Q = Y @ Y.T, identity
        Z = torch.addmm(R, R, R, beta=b, alpha=c)
        Q = torch.addmm(Q, Q, Z, beta=a)
        W = torch.addmm(R, R, Z, beta=a)
        R = torch.addmm(W, Z, W, beta=a)
    return Q @ Y


def extended() -> bool:
    return bool(np.finfo(np.longdouble).eps < 2e-19)


class Judge:
    """The exact result of one matrix, and the error of the plain iteration in any dtype."""

    def __init__(self, X: Tensor, c: Coefficients, scale: str = "", eps: float = 0.0) -> None:
        self.wide, self.triples = X.shape[0] <= X.shape[1], c.steps()
        array = X.detach().double().numpy()
        self._scaled: Callable[[Any], Any] = lambda t: scaled(array.astype(t), c, scale, eps)
        self.input = torch.from_numpy(self._scaled(np.float64))
        self.simple = self.input
        if (scale or c.prescale) == "frobenius":
            Y = torch.from_numpy(array)
            self.simple = Y / (Y.norm().clamp(min=eps or 5e-324) * c.safety)
        self.exact = torch.from_numpy(exact_direct(self.input.numpy(), self.triples))

    @cached_property
    def _longer(self) -> Any:
        return exact_direct(self._scaled(np.longdouble), self.triples)

    def off(self, Q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q - exact, on the wide side; longdouble where `dtype`, that of the iterates, needs it."""
        Q = Q if self.wide else Q.T
        if dtype == torch.float64 and extended():
            return torch.from_numpy((Q.numpy().astype(np.longdouble) - self._longer).astype(float))
        return Q.double() - self.exact

    def plain(self, dtype: torch.dtype, restarts: Sequence[int] | None = None) -> Tensor:
        """What the plain iteration in `dtype` is off by (Gram form if restarts are given)."""
        if dtype == torch.float64 and not extended():  # rounding is linear in eps
            return self.plain(torch.float32, restarts) * 2.0**-28
        Y = self.simple if dtype == torch.float64 else self.input.to(dtype)
        Q = plain_direct(Y, self.triples)
        Q = Q if restarts is None else plain_gram(Y, self.triples, restarts)
        return self.off(Q if self.wide else Q.T, dtype)

    def bound(self, dtype: torch.dtype, restarts: Sequence[int] | None = None) -> float:
        return 2 * self.plain(dtype, restarts).norm().item()

    def holds(self, Q: Tensor, dtype: torch.dtype, restarts: Sequence[int] | None = None) -> None:
        """The rule; on a few elements plain torch may be exact by luck, hence 4 ulp (test_ops)."""
        hold([(self, Q)], dtype, restarts)


def hold(
    judged: Sequence[tuple[Judge, Tensor]],
    dtype: torch.dtype,
    restarts: Sequence[int] | None = None,
) -> None:
    """The rule on what several matrices of one shape are off by together."""
    off = math.hypot(*(j.off(Q, dtype).norm().item() for j, Q in judged))
    bound = math.hypot(*(j.bound(dtype, restarts) for j, _ in judged))
    size = math.hypot(*(j.exact.norm().item() for j, _ in judged))
    few = 4 * torch.finfo(dtype).eps * size if judged[0][0].exact.numel() < 100 else 0.0
    eps = torch.finfo(judged[0][1].dtype).eps  # if the result is rounded again
    out = eps * size if eps > torch.finfo(dtype).eps else 0.0
    assert all(Q.isfinite().all() for _, Q in judged)
    assert off <= bound + few + out


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    rest = i / max(n - 1, 1)
    if kind == "two spikes":
        return torch.where(i < 2, 1.0, 10.0 ** (-4 - 3 * rest))
    return {
        "log 1e-2": 10.0 ** (-2 * rest),
        "log 1e-3": 10.0 ** (-3 * rest),
        "log 1e-5": 10.0 ** (-5 * rest),
        "rank n/2": (i < n // 2).double(),
        "power law": 1 / (1 + i),
        "condition 1e-6": torch.where(i < n - n // 4, 1.0, 1e-6),
        "condition 1e-12": torch.where(i < n - n // 4, 1.0, 1e-12),
        "one tiny": torch.where(i < n - 1, 1.0, 1e-6),
        "one large": torch.where(i < 1, 1.0, 1e-5),
        "clustered": torch.where(i < n // 2, 1.0, 1e-3) * (1 + 1e-9 * i),
        "flat": torch.ones(n, dtype=torch.float64),
    }[kind]


def matrix(kind: str, m: int, n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    """float64, with the singular values that `kind` names."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    if kind == "gaussian":
        return normal(m, n)
    k = min(m, n)
    U, V = torch.linalg.qr(normal(m, k)).Q, torch.linalg.qr(normal(n, k)).Q
    return U * spectrum(kind, k) @ V.mT


def restarts_of(c: Coefficients, dtype: str) -> tuple[int, ...]:
    return default_restarts(c, dtype)
