"""AuON, AdaGO, PolarGrad, MuonEq, SWAN, SCALE, steepest descent and Dions in NumPy, and cases."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle_muon import adamuon, shape_factor
from oracles import KELLER, Array, State, momentum, newton_schulz
from orthonorm.coefficients import COEFFICIENTS

FULL = dict(precision="full")
EXPRESS = dict(
    triples=COEFFICIENTS["polar_express"].steps(), safety=COEFFICIENTS["polar_express"].safety
)


def auon(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    paper: bool = False, gamma: float = 1.5,
) -> Array:  # fmt: skip
    g = momentum(G, s, 0.95, True)
    X = g / (np.sqrt((g * g).sum()) + 1e-7)
    rho = np.sqrt((np.cosh(X if paper else gamma * X) ** 2).mean())
    return (1 - lr * weight_decay) * W - lr * (X if paper else g) / (rho + 1e-8)


def hybrid_auon(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    paper: bool = False, gamma: float = 1.5,
) -> Array:  # fmt: skip
    O = newton_schulz(momentum(G, s, 0.95, True), KELLER[:1] if paper else KELLER)  # noqa: E741
    if paper:
        brake = (np.cosh(O) ** 2).sum() / O.size
    else:
        brake = np.sqrt((np.cosh(gamma * O / (np.linalg.norm(O) + 1e-7)) ** 2).mean())
    return (1 - lr * weight_decay) * W - lr * O / (brake + 1e-8)


def adago(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    gamma: float = 10.0, floor: float = 5e-4, v0: float = 1e-3, nesterov: bool = False,
) -> Array:  # fmt: skip
    size = min(float(np.linalg.norm(G)), gamma)
    s["v2"] = s.get("v2", v0**2) + size**2
    alpha = max(floor, lr * size / s["v2"] ** 0.5)
    return (1 - lr * weight_decay) * W - alpha * newton_schulz(momentum(G, s, 0.95, nesterov))


def polargrad(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    polar_first: bool = False, mu: float = 0.95,
) -> Array:  # fmt: skip
    if polar_first:
        U = newton_schulz(G, **EXPRESS)
        step = (G * U).sum() * momentum(U, s, mu, False)
    else:
        M = momentum(G, s, mu, False)
        U = newton_schulz(M, **EXPRESS)
        step = (M * U).sum() * U
    return (1 - lr * weight_decay) * W - lr * step


def muoneq(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.1,
    equilibrate: str = "row", eps: float = 1e-8,
) -> Array:  # fmt: skip
    M = momentum(G, s, 0.95, True)
    rows = np.diag(1 / np.sqrt(np.diag(M @ M.T) + eps))
    columns = np.diag(1 / np.sqrt(np.diag(M.T @ M) + eps))
    X = {"row": rows @ M, "column": M @ columns, "both": rows @ M @ columns}[equilibrate]
    X = newton_schulz(X) * shape_factor("match_rms_adamw", *W.shape)
    return (1 - lr * weight_decay) * W - lr * X


def swan(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    rescale: bool = False,
) -> Array:  # fmt: skip
    Z = (G - G.mean(axis=1, keepdims=True)) / (G.std(axis=1, keepdims=True) + 1e-8)
    O = newton_schulz(Z, **EXPRESS)  # noqa: E741
    if rescale and np.linalg.norm(O) > 0:
        O = O * np.linalg.norm(Z) / np.linalg.norm(O)  # noqa: E741
    return (1 - lr * weight_decay) * W - lr * O


def scale(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0, mu: float = 0.0
) -> Array:
    U = momentum(G, s, mu, False)
    return (1 - lr * weight_decay) * W - lr * U / (np.linalg.norm(U, axis=0, keepdims=True) + 1e-8)


def steepest(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    mu: float = 0.0, norm: str = "linear", dual: bool = True,
) -> Array:  # fmt: skip
    U = momentum(G, s, mu, False)
    m, n = U.shape
    rows = U / np.linalg.norm(U, axis=1, keepdims=True)
    T = {"linear": (m / n) ** 0.5 * newton_schulz(U), "embedding": n**0.5 * rows,
         "head": rows / n**0.5, "max": np.sign(U)}[norm]  # fmt: skip
    return (1 - lr * weight_decay) * W - lr * ((U * T).sum() if dual else 1.0) * T


def dion(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.01,
    rank_fraction: float = 1.0, mu: float = 0.95,
) -> Array:  # fmt: skip
    m, n = W.shape
    k = int(np.ceil(rank_fraction * min(m, n)))
    if t == 1:
        s["Q"] = np.cos(np.pi * np.outer(np.arange(n) + 0.5, np.arange(k)) / n)
        s["M"] = np.zeros_like(W)
    B = s["M"] + G
    P = np.linalg.qr(B @ s["Q"])[0]
    R = B.T @ P
    s["M"] = B - (1 - mu) * P @ R.T
    s["Q"] = R / np.sqrt((R * R).sum(axis=0))
    return (1 - lr * weight_decay) * W - lr * (m / n) ** 0.5 * P @ s["Q"].T


def dion2(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.01,
    fraction: float = 0.25, mu: float = 0.95, beta2: float | None = None,
) -> Array:  # fmt: skip
    """Row by row, columns as the rows of the transpose."""
    m, n = W.shape
    B = s["M"] = s.get("M", 0.0) + G
    turned = m > n and beta2 is None
    V = (1 - lr * weight_decay) * W
    rows, target = (B.T, V.T) if turned else (B, V)
    K = np.argsort(-np.abs(rows).sum(axis=1))[: int(np.ceil(fraction * len(rows)))]
    O = newton_schulz(rows[K], triples=EXPRESS["triples"][:5], safety=EXPRESS["safety"])  # noqa: E741
    rows[K] *= mu
    if beta2 is not None:
        v = s.setdefault("v", np.zeros(m))
        v[K] = beta2 * v[K] + (1 - beta2) * (O * O).mean(axis=1)
        N = O / (np.sqrt(v[K])[:, None] + 1e-8)
        O = N * np.linalg.norm(O) / np.linalg.norm(N)  # noqa: E741
    target[K] -= lr * (m / n) ** 0.5 * O
    return V


def both(name: str, rule: Any, same: dict[str, Any], **ours: Any) -> Any:
    """A case whose arguments are named alike on both sides, but for `ours`."""
    return name, {**same, **ours}, rule, same


PAPER: dict[str, Any] = dict(variant="paper")
RELATIVES = [
    both("AuON", auon, dict(lr=0.24, weight_decay=0.1)),
    ("AuON", dict(PAPER, lr=0.1), auon, dict(lr=0.1, paper=True)),
    both("HybridAuON", hybrid_auon, dict(lr=0.1, weight_decay=0.1, gamma=0.7), **FULL),
    ("HybridAuON", dict(FULL, **PAPER, lr=0.1), hybrid_auon, dict(lr=0.1, paper=True)),
    both("AdaGO", adago, dict(lr=0.05, weight_decay=0.1, nesterov=True), **FULL),
    both("AdaGO", adago, dict(lr=0.05, gamma=5.0, floor=0.02), **FULL),
    both("PolarGrad", polargrad, dict(lr=0.02, weight_decay=0.1), **FULL),
    both("PolarGrad", polargrad, dict(lr=0.02, polar_first=True), **FULL),
    *(both("MuonEq", muoneq, dict(lr=0.02, equilibrate=side), **FULL)
      for side in ("row", "column", "both")),
    both("SWAN", swan, dict(lr=0.02, weight_decay=0.1), **FULL),
    both("SWAN", swan, dict(lr=0.02, rescale=True), **FULL),
    both("SCALE", scale, dict(lr=0.02, weight_decay=0.1)),
    ("SCALE", dict(lr=0.02, momentum=0.9), scale, dict(lr=0.02, mu=0.9)),
    *(both("SteepestDescent", steepest, dict(lr=1e-3, norm=norm, dual=d), **FULL)
      for norm in ("linear", "embedding", "head", "max") for d in (True, False)),
    ("SteepestDescent", dict(FULL, lr=1e-3, momentum=0.9), steepest, dict(lr=1e-3, mu=0.9)),
    both("Dion", dion, dict(lr=0.02, weight_decay=0.1)),
    both("Dion", dion, dict(lr=0.02, rank_fraction=0.3)),
    both("Dion2", dion2, dict(lr=0.02, weight_decay=0.1), **FULL),
    both("Dion2", dion2, dict(lr=0.02, fraction=0.6, beta2=0.9), **FULL),
    *(("AdaMuon", dict(FULL, lr=1e-3, rescale=r, moment=m), adamuon,
       dict(lr=1e-3, rescale=r, moment=m)) for r, m in
      (("none", "factored"), ("none", "study"), ("rms", "factored"))),
]  # fmt: skip
