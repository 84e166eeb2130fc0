"""SSO and StiefelAdam in NumPy, and cases."""

from __future__ import annotations

import numpy as np
from oracle_relatives import EXPRESS, both
from oracles import Array, State, momentum, newton_schulz


def first_right(n: int) -> Array:
    """Where the power iteration starts."""
    x = np.sin(np.arange(1, n + 1) * 12.9898) * 43758.5453
    x = np.fmod(x, 1.0) + 0.25
    return x / np.linalg.norm(x)


def sso(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.0,
    radius: float = 1.0, power_steps: int = 10, bisections: int = 20, retract: bool = True,
) -> Array:  # fmt: skip
    m, n = W.shape
    R = radius * (m / n) ** 0.5
    v = s.get("v", first_right(n))
    for _ in range(power_steps):
        u = W @ v / np.linalg.norm(W @ v)
        v = W.T @ u / np.linalg.norm(W.T @ u)
    s["v"], top = v, np.outer(u, v)
    if retract:
        W = W * R / (u @ W @ v)
    B = momentum(G, s, 0.9, True)
    X = B / np.linalg.norm(B)

    def polar(lam: float) -> Array:
        return newton_schulz(
            X + lam * top, triples=EXPRESS["triples"][:5], safety=EXPRESS["safety"]
        )

    high = 2 * (X * polar(0.0)).sum()
    low = -high
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (middle, high) if (top * polar(middle)).sum() < 0 else (low, middle)
    return (1 - lr * weight_decay) * W - lr * R * polar((low + high) / 2)


def stiefel_adam(
    W: Array, G: Array, s: State, t: int, *, lr: float, betas: tuple[float, float] = (0.9, 0.99),
    metric: float = 0.5, eps: float = 1e-5,
) -> Array:  # fmt: skip
    """Line by line as the authors' `_update_func_Stiefel_Adam`, the last factor by SVD."""
    if W.shape[0] < W.shape[1]:
        return stiefel_adam(W.T, G.T, s, t, lr=lr, betas=betas, metric=metric, eps=eps).T
    (d, k), (b1, b2) = W.shape, betas
    if t == 1:
        s.update(Y=np.zeros((k, k)), pY=np.zeros((k, k)), V=np.zeros((d, k)), pV=np.zeros((d, k)))
    b = metric / (metric - 1)
    grad_Y = (1 - b) / 2 * (W.T @ G - G.T @ W)
    grad_V = G - W @ W.T @ G
    s["Y"] = b1 * s["Y"] - (1 - b1) * grad_Y
    s["pY"] = b2 * s["pY"] + (1 - b2) * grad_Y**2
    xi = lr / (1 - b1**t) * s["Y"] / (np.sqrt(s["pY"] / (1 - b2**t)) + eps)
    X = W @ (np.eye(k) + xi)
    if d > k:
        s["pV"] = b2 * s["pV"] + (1 - b2) * grad_V**2
        V = b1 * s["V"]
        V = V - (3 * metric - 2) / 2 * lr / b1 * V @ s["Y"] - (1 - b1) * grad_V
        D = V / (np.sqrt(s["pV"] / (1 - b2**t)) + eps)
        D = D - X @ np.linalg.inv(X.T @ X) @ X.T @ D
        s["V"] = V - lr * X @ D.T @ V
        X = X + lr * D @ (X.T @ X)
    U, _, Vt = np.linalg.svd(X, full_matrices=False)
    return U @ Vt


FULL = dict(precision="full")
MANIFOLDS = [
    both("SSO", sso, dict(lr=0.02, weight_decay=0.1), **FULL),
    both("SSO", sso, dict(lr=0.02, radius=2.0, bisections=8, power_steps=3), **FULL),
    both("SSO", sso, dict(lr=0.02, retract=False), **FULL),
    both("StiefelAdam", stiefel_adam, dict(lr=0.02)),
    both("StiefelAdam", stiefel_adam, dict(lr=0.01, metric=0.0, betas=(0.8, 0.95), eps=1e-3)),
]
