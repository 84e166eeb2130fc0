"""Muon, NorMuon and AdaMuon in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracles import KELLER, Array, State, momentum, newton_schulz


def shape_factor(name: str, m: int, n: int) -> float:
    if name == "original":
        return max(1.0, m / n) ** 0.5
    if name == "match_rms_adamw":
        return 0.2 * max(m, n) ** 0.5
    return {"spectral": (m / n) ** 0.5, "spectral_max": max(m, n) ** 0.5, "rows": m**0.5}.get(
        name, 1.0
    )


def muon(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.1,
    mu: float = 0.95, nesterov: bool = True, adjust: str = "original", triples: Any = KELLER,
    safety: float = 1.0, heavy_ball: bool = False, decay: str = "decoupled", bound: float = 1.0,
) -> Array:  # fmt: skip
    X = newton_schulz(momentum(G, s, mu, nesterov, heavy_ball), triples, safety)
    X = shape_factor(adjust, *W.shape) * X
    if decay == "cautious":
        return W - lr * (X + weight_decay * W * (X * W >= 0))
    if decay == "clipped":
        return W - lr * (X + weight_decay * excess(W, bound))
    return (1 - lr * weight_decay) * W - lr * X


def excess(W: Array, bound: float) -> Array:
    """The part of W's singular values above bound sqrt(m/n)."""
    m, n = W.shape
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return (U * np.maximum(S - bound * (m / n) ** 0.5, 0.0)) @ Vt


def normuon(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    mu: float = 0.95, beta2: float = 0.95, eps: float = 1e-10, axis: str = "row",
    rescale: str = "norm",
) -> Array:  # fmt: skip
    m, n = W.shape
    X = newton_schulz(momentum(G, s, mu, True))
    over = 0 if axis == "long" and m < n else 1
    mean = (X * X).mean(axis=over, keepdims=True)
    s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * mean
    N = X / (np.sqrt(s["v"]) + eps)
    if rescale == "norm":
        N *= np.linalg.norm(X) / np.linalg.norm(N) * shape_factor("original", m, n)
    else:
        N *= 0.2 * (m * n) ** 0.5 / np.linalg.norm(N)
    return (1 - lr * weight_decay) * W - lr * N


def adamuon(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.01,
    mu: float = 0.95, beta2: float = 0.999, eps: float = 1e-8, sign: bool = False,
    rescale: str = "rms", moment: str = "elementwise",
) -> Array:  # fmt: skip
    m, n = W.shape
    U = momentum(G, s, mu, True)
    X = newton_schulz(np.sign(U) if sign else U)
    if moment == "elementwise":
        V = s["V"] = beta2 * s.get("V", 0.0) + (1 - beta2) * X * X
    else:
        r = s["r"] = beta2 * s.get("r", 0.0) + (1 - beta2) * (X * X).mean(axis=1)
        c = s["c"] = beta2 * s.get("c", 0.0) + (1 - beta2) * (X * X).mean(axis=0)
        V = np.outer(r, c) / r.mean()
    N = X / (np.sqrt(V / (1 - beta2**t)) + eps)
    if moment == "study":
        N *= (n / m) ** 0.5
    if rescale == "rms":
        N *= min(m, n) ** 0.5 / (np.linalg.norm(N) + eps) * 0.2 * max(m, n) ** 0.5
    return (1 - lr * weight_decay) * W - lr * N
