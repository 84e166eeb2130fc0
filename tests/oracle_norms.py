"""Signum, the trust-region family and Scion in NumPy."""

from __future__ import annotations

import numpy as np
from oracles import Array, State, momentum, newton_schulz


def signum(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float, mu: float = 0.9
) -> Array:
    return W - lr * (np.sign(momentum(G, s, mu, False)) + weight_decay * W)


def trust_region(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float, norm: str,
    composite: bool, mu: float = 0.95,
) -> Array:  # fmt: skip
    """The minimizer by SVD, entry by entry or along the ray, from the gradient of the model at X:
    B + wd X + multiplier = 0, so X - W = -(B + wd W) / wd where that is within the ball."""
    B = momentum(G, s, mu, False)
    if not composite:
        T = {
            "spectral": newton_schulz, "max": np.sign, "frobenius": lambda X: X / np.linalg.norm(X)
        }[norm](B)  # fmt: skip
        return (1 - lr * weight_decay) * W - lr * T
    D = (B + weight_decay * W) / weight_decay
    if norm == "spectral":
        U, S, Vt = np.linalg.svd(D, full_matrices=False)
        return W - (U * np.minimum(S, lr)) @ Vt
    if norm == "max":
        return W - np.clip(D, -lr, lr)
    return W - D * min(1.0, lr / float(np.linalg.norm(D)))


def scion(
    W: Array, G: Array, s: State, t: int, *, lr: float, alpha: float = 1.0, norm: str = "spectral",
    scale: float = 1.0, unconstrained: bool = False, normalized: bool = True,
    transpose: bool = False, largest: bool = False, light: bool = False, eps: float = 1e-8,
) -> Array:  # fmt: skip
    kept = s.get("d", np.zeros_like(G))
    d = s["d"] = (1 - alpha) * kept + (G if light else alpha * G)
    if W.ndim < 2:
        u = d / (np.sqrt((d * d).mean()) + eps)
    else:
        u = (
            lmo(d.T, norm, normalized, largest, eps).T
            if transpose
            else lmo(d, norm, normalized, largest, eps)
        )
    return (W if unconstrained else (1 - lr) * W) - lr * scale * u


def lmo(d: Array, norm: str, normalized: bool, largest: bool, eps: float) -> Array:
    m, n = d.shape
    if norm == "spectral":
        factor = (m / n) ** 0.5 if normalized else m**0.5
        return newton_schulz(d) * (max(1.0, factor) if largest else factor)
    if norm == "column":
        rms = np.sqrt((d * d).sum(axis=0, keepdims=True) / m)
        return d / (rms * (n if normalized else 1) + eps)
    if norm == "row":
        length = np.sqrt((d * d).sum(axis=1, keepdims=True))
        return d / (length * (n**0.5 if normalized else 1) + eps)
    if "embed" in norm:
        rows = d / (np.sqrt((d * d).sum(axis=1, keepdims=True)) + eps)
        power = n if norm.endswith("linear") else n**0.5
        return rows / power if norm.startswith("un") else rows * power
    return np.sign(d) / (n if normalized else 1)
