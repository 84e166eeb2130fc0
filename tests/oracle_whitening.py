"""Shampoo and SOAP in NumPy: momentum in the original coordinates, einsum-free, by their papers."""

from __future__ import annotations

import numpy as np
from oracles import Array, State, momentum


def eigenbasis(A: Array) -> Array:
    """Eigenvectors by descending eigenvalue."""
    return np.linalg.eigh(A)[1][:, ::-1]


def soap(
    W: Array, G: Array, s: State, t: int, *, lr: float, betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float | None = None, eps: float = 1e-8, weight_decay: float = 0.0,
    frequency: int = 10, study: bool = False, longest: int = 10000,
) -> Array:  # fmt: skip
    m, n = W.shape
    b1, b2 = betas
    beta = b2 if shampoo_beta is None else shampoo_beta
    W = (1 - lr * weight_decay) * W if t > 1 else W
    if t == 1:
        s.update(M=np.zeros_like(W), V=np.zeros_like(W), L=np.zeros((m, m)), R=np.zeros((n, n)))
        s.update(QL=np.eye(m), QR=np.eye(n))
    else:
        g = s["QL"].T @ G @ s["QR"]
        s["M"] = b1 * s["M"] + (1 - b1) * G
        s["V"] = b2 * s["V"] + (1 - b2) * g * g
        rotated = s["QL"].T @ s["M"] @ s["QR"]
        k = t if study else t - 1
        if study:
            N = rotated / (1 - b1**k) / (np.sqrt(s["V"] / (1 - b2**k)) + eps)
        else:
            N = rotated / (np.sqrt(s["V"]) + eps) * (1 - b2**k) ** 0.5 / (1 - b1**k)
        W = W - lr * s["QL"] @ N @ s["QR"].T
    s["L"] = beta * s["L"] + (1 - beta) * G @ G.T
    s["R"] = beta * s["R"] + (1 - beta) * G.T @ G
    if (t - 1) % frequency == 0:
        for Q, A, size, axis in (("QL", "L", m, 0), ("QR", "R", n, 1)):
            if size > longest:
                continue
            if t == 1 or study:
                s[Q] = eigenbasis(s[A])
            else:
                order = np.argsort(-np.diag(s[Q].T @ s[A] @ s[Q]), kind="stable")
                s["V"] = np.take(s["V"], order, axis=axis)
                s[Q] = np.linalg.qr(s[A] @ s[Q][:, order])[0]
    return W


def splus(
    W: Array, G: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.01,
    mu: float = 0.9, beta2: float = 0.999, frequency: int = 100, longest: int = 10000,
) -> Array:  # fmt: skip
    m, n = W.shape
    if t == 1:
        s.update(L=np.zeros((m, m)), R=np.zeros((n, n)), QL=np.eye(m), QR=np.eye(n))
    B = momentum(G, s, mu, False)
    u = s["QL"] @ np.sign(s["QL"].T @ B @ s["QR"]) @ s["QR"].T
    s["L"] = beta2 * s["L"] + (1 - beta2) * G @ G.T
    s["R"] = beta2 * s["R"] + (1 - beta2) * G.T @ G
    if t == 1 or t % frequency == 0:
        s["QL"] = eigenbasis(s["L"]) if m <= longest else s["QL"]
        s["QR"] = eigenbasis(s["R"]) if n <= longest else s["QR"]
    return (1 - lr * weight_decay) * W - lr * 2 / (m + n) * u


def power(A: Array, ridge: float, eps: float) -> Array:
    values, Q = np.linalg.eigh(A + ridge * np.eye(len(A)))
    return Q @ np.diag(1 / (np.abs(values) ** 0.25 + eps)) @ Q.T


def shampoo(
    W: Array, G: Array, s: State, t: int, *, lr: float, mu: float = 0.0, beta2: float = 1.0,
    eps: float = 1e-6, frequency: int = 1, weight_decay: float = 0.0, study: bool = False,
    longest: int = 10000,
) -> Array:  # fmt: skip
    m, n = W.shape
    if t == 1:
        s.update(L=np.zeros((m, m)), R=np.zeros((n, n)), PL=np.eye(m), PR=np.eye(n), V=0.0)
    U = momentum(G, s, mu, False)
    refresh = (t - 1) % frequency == 0
    if not study:
        s["L"] = beta2 * s["L"] + (1.0 if beta2 == 1 else 1 - beta2) * G @ G.T
        s["R"] = beta2 * s["R"] + (1.0 if beta2 == 1 else 1 - beta2) * G.T @ G
        if refresh:
            for P, A, size in (("PL", "L", m), ("PR", "R", n)):
                s[P] = power(s[A], eps, 0.0) if size <= longest else s[P]
        return (1 - lr * weight_decay) * W - lr * s["PL"] @ U @ s["PR"]
    s["V"] = beta2 * s["V"] + (1 - beta2) * G * G
    root = np.sqrt(s["V"]) + eps
    U = U / (1 - mu**t) / root
    U = s["PL"] @ U @ s["PR"] * np.mean(np.sqrt(np.diag(s["R"])))
    g = G / root
    s["L"] = beta2 * s["L"] + (1 - beta2) * g @ g.T / n
    s["R"] = beta2 * s["R"] + (1 - beta2) * g.T @ g / m
    if refresh:
        s["L"], s["R"] = s["L"] / (1 - beta2**t), s["R"] / (1 - beta2**t)
        s["PL"], s["PR"] = power(s["L"], 1e-30, 1e-8), power(s["R"], 1e-30, 1e-8)
    return (1 - lr * weight_decay) * W - lr * U
