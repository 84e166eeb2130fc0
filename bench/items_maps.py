"""Rows of orthonorm.nn: functions of matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from orthonorm import nn as onn
from torch import Tensor

from .inputs import Arguments, Inputs
from .items import Item, first, matrices, orthonormal, polar, spectral
from .shapes import Shape


# ---- whitening -----------------------------------------------------------------------------------
def whitened(Z: Tensor, steps: int = 4, axis: str = "batch") -> Tensor:
    """Whiten by eigenvalues: p <- (3 p - p^3 x) / 2, x an eigenvalue of covariance / trace."""
    X = Z if axis == "batch" else Z.mT
    X = X - X.mean(-1, keepdim=True)
    values, vectors = torch.linalg.eigh(X @ X.mT / (X.shape[-1] - 1))
    x, p = values / values.sum(-1, keepdim=True), torch.ones_like(values)
    for _ in range(steps):
        p = 1.5 * p - 0.5 * p**3 * x
    p = p * values.sum(-1, keepdim=True).rsqrt()
    out = (vectors * p.unsqueeze(-2)) @ vectors.mT @ X
    return out if axis == "batch" else out.mT


def intl(views: list[Tensor], weight: float) -> Tensor:
    """Compute the INTL loss term by term, from `whitened`."""
    t = [whitened(z) for z in views]
    terms = []
    for other in t[1:]:
        cosines = (other * t[0]).sum(1) / other.norm(dim=1) / t[0].norm(dim=1)
        spread = sum(((x.var(1) - 1) ** 2).sum() for x in (other, t[0]))
        terms.append((2 - 2 * cosines).mean() + weight * spread)
    return sum(terms) / len(terms)


def views(shape: Shape, inputs: Inputs) -> Arguments:
    m, n = shape
    return {"views": [inputs.put(inputs.normal(f"Z{i}", (m, 2 * n))) for i in range(3)],
            "weight": 0.1}  # fmt: skip


# ---- Grassmann and Stiefel -----------------------------------------------------------------------
def subspaces(other: str) -> Any:
    """Return a maker of S with orthonormal columns and of another matrix of its shape."""

    def make(shape: Shape, inputs: Inputs) -> Arguments:
        d, k = max(shape), max(1, min(shape) // 2)
        return {"S": orthonormal(inputs, "S", d, k), other: inputs.put(inputs.normal("D", (d, k)))}

    return make


def grassmann(S: Tensor, D: Tensor) -> Tensor:
    """Project D onto the complement of the span of S, by an SVD."""
    U = torch.linalg.svd(S)[0][:, S.shape[1] :]
    return U @ (U.mT @ D)


def stiefel_tangent(S: Tensor, D: Tensor) -> Tensor:
    """Return S times the skew part of S^T D, plus the part of D outside the span of S."""
    A = S.mT @ D
    return S @ (0.5 * (A - A.mT)) + grassmann(S, D)


def logits(shape: Shape, inputs: Inputs) -> Arguments:
    d, k = max(shape), 3
    S = torch.stack([orthonormal(inputs, f"S{c}", d, k) for c in range(4)])
    return {"S": S, "x": inputs.put(inputs.normal("x", (5, d))), "gamma": 7.0}


def projected_lengths(S: Tensor, x: Tensor, gamma: float) -> Tensor:
    """Return the lengths of the projections on each class, by projectors."""
    P = S @ S.mT
    lengths = torch.stack([(p @ x.mT).norm(dim=0) for p in P], -1)
    return gamma * lengths / x.norm(dim=-1, keepdim=True)


# ---- low rank ------------------------------------------------------------------------------------
def adapter(shape: Shape, inputs: Inputs) -> Arguments:
    m, n = shape
    r = min(m, n, 4)
    A = inputs.put(inputs.normal("A", (r, n)))
    return {"B": inputs.put(inputs.normal("B", (m, r))), "A": A}


def lora(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return B @ (U * s) @ U.mT, U @ Vh


def star(delta: Tensor, rank: int) -> Tensor:
    return spectral(delta, lambda s: s * (torch.arange(len(s)) < rank) * s.sum() / s[:rank].sum())


def cayley(A: Tensor) -> Tensor:
    K, identity = (A - A.mT) / 2, torch.eye(A.shape[-1]).to(A)
    return torch.linalg.solve(identity + K, identity - K, left=False)


def turned(shape: Shape, inputs: Inputs) -> Arguments:
    m, n = shape
    r = min(m, n, 4)
    A, B = (inputs.put(inputs.normal(tag, (r, r))) for tag in "AB")
    s = inputs.put(torch.linspace(2, 1, r))
    U, V = orthonormal(inputs, "U", m, r), orthonormal(inputs, "V", n, r)
    return {"U": U, "s": s, "V": V, "A": A, "B": B}


def columns(shape: Shape, inputs: Inputs) -> Arguments:
    return {"U": inputs.matrix("U", shape), "columns": torch.arange(0, shape[-1], 2)}


def chosen_columns(U: Tensor, columns: Tensor) -> Tensor:
    lengths = torch.ones_like(U[0])
    lengths[columns] = (U.mT @ U).diagonal().sqrt()[columns]
    return U @ torch.diag(1 / lengths)


# ---- caps ----------------------------------------------------------------------------------------
def strength(cap: float, update: float, decay: float) -> float:
    """Return the least positive root of -k^9 a^4 + 3 k^7 a^3 - 3 k^5 a^2 + k - cap."""
    k = cap * (1 - decay) + update
    C = torch.diag(torch.ones(3, dtype=torch.float64), -1)  # companion matrix, over -k^9
    C[0] = torch.tensor([3 / k**2, -3 / k**4, 0.0, (k - cap) / k**9])
    roots = torch.linalg.eigvals(C)
    return min(r.real.item() for r in roots if abs(r.imag) < 1e-9 and r.real > 0)


def soft(s: Tensor, a: float = 0.1) -> Tensor:
    x = s - a * s**3
    return x + a * x**3


def embedded(E: Tensor, inflation: float) -> Tensor:
    rows = [x / max(1 / inflation, x.square().mean().sqrt().item()) for x in E]
    return torch.stack(rows)


def stepped(W: Tensor, G: Tensor, cap: float) -> Tensor:
    """Take a step of SGD with the cap after it."""
    p = torch.nn.Parameter(W.clone())
    optimizer = torch.optim.SGD([p], lr=0.5)
    handle = onn.after_step(optimizer, lambda A: onn.hard_cap(A, cap), [p])
    p.grad = G
    optimizer.step()
    handle.remove()
    return p.detach()


def constrained(W: Tensor) -> Tensor:
    new = W.clone()
    onn.constrain_([new], lambda A: onn.hard_cap(A, 0.5), scaled=True)
    return new


def initialized(shape: Shape, scale: float) -> Tensor:
    torch.manual_seed(0)
    return onn.spectral_init_(torch.empty(shape), scale)


def drawn(shape: Shape, scale: float) -> Tensor:
    torch.manual_seed(0)
    X = torch.randn(shape).double()
    return X / torch.linalg.svdvals(X)[0] * scale * math.sqrt(shape[0] / shape[1])


def capped(cap: float) -> Any:
    return lambda W, **_: spectral(W, lambda s: s.clamp(max=cap))


# ---- Jacobians -----------------------------------------------------------------------------------
def linear_maps(shape: Shape, inputs: Inputs) -> Arguments:
    m, n = shape
    return {"A": inputs.matrix("A", shape), "B": inputs.matrix("B", (m, m)),
            "x": inputs.put(inputs.normal("x", (3, n)))}  # fmt: skip


def square(A: Tensor, x: Tensor, **_: Any) -> Tensor:
    torch.manual_seed(0)
    return onn.jacobian_square(lambda z: z @ A.mT, x, samples=2)


def noise(A: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^T J^T J e for the noise e that `square` draws; the map is linear."""
    e = [torch.randn_like(x) for _ in range(2)]
    return sum(((z @ (A.mT @ A)) * z).sum(1) for z in e) / 2


def noise_of(A: Tensor, x: Tensor, **_: Any) -> Tensor:
    torch.manual_seed(0)
    return noise(A, x)


def penalty(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    maps = (lambda z: z @ B.mT, lambda z: z @ A.mT)
    return onn.jacobian_nuclear_penalty(*maps, x, samples=2)


def penalty_of(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return 0.5 * (noise(B, x @ A.mT) + noise(A, x)).mean()


MAPS: dict[str, Item] = {
    "nn.IterNorm": Item(
        matrices("Z"), lambda Z: whitened(Z, 3, "channel"), gradient=("Z",),
        call=lambda Z: onn.IterNorm(3, "channel")(Z),
    ),
    "nn.iter_norm": Item(matrices("Z"), whitened, gradient=("Z",)),
    "nn.intl_loss": Item(views, intl, gradient=("views",)),
    "nn.trace_loss": Item(
        matrices("Z"), gradient=("Z",),
        formula=lambda Z: (((Z - Z.mean(1, True)) ** 2).sum(1) / (Z.shape[1] - 1) - 1).pow(2).sum(),
    ),
    "nn.grassmann_tangent": Item(subspaces("D"), grassmann, gradient=("S", "D")),
    "nn.stiefel_tangent": Item(subspaces("D"), stiefel_tangent, gradient=("S", "D")),
    "nn.polar_retraction": Item(subspaces("T"), lambda S, T: polar(S - T)),
    "nn.grassmann_logits": Item(logits, projected_lengths, gradient=("x", "S")),
    "nn.nuclear_norm": Item(matrices("X"), lambda X: torch.linalg.svdvals(X).sum()),
    "nn.orthonormalize_lora": Item(adapter, lora),
    "nn.star": Item(
        matrices("delta", rank=2, steps=30), lambda delta, rank, **_: star(delta, rank)
    ),
    "nn.cayley_rotation": Item(
        lambda s, inputs: {"A": inputs.put(inputs.normal("A", (s[0], s[0])))}, cayley,
        gradient=("A",),
    ),
    "nn.spectral_rotation": Item(
        turned, gradient=("U", "s", "V", "A", "B"),
        formula=lambda U, s, V, A, B: U @ cayley(A) @ torch.diag(s) @ (V @ cayley(B)).mT,
    ),
    "nn.renormalize_columns_": Item(columns, chosen_columns),
    "nn.spectral_normalize": Item(
        matrices("W", cap=0.3), lambda W, cap: spectral(W, lambda s: s / (s[0] / cap).clamp(min=1))
    ),
    "nn.spectral_hammer": Item(
        matrices("W", cap=3.0, steps=40),
        lambda W, cap, **_: spectral(W, lambda s: first(s, lambda x: 0 * x + cap)),
    ),
    "nn.spectral_decay": Item(
        matrices("W", rate=0.3, steps=40),
        lambda W, rate, **_: spectral(W, lambda s: first(s, lambda x: (1 - rate) * x)),
    ),
    "nn.soft_cap_strength": Item(
        lambda *_: {"cap": 1.0, "update": 0.1, "decay": 0.02}, strength, rtol=1e-8
    ),
    "nn.soft_cap": Item(matrices("W", strength=0.1), lambda W, strength: spectral(W, soft)),
    "nn.hard_cap": Item(matrices("W", cap=0.3), lambda W, cap: capped(cap)(W)),
    "nn.spectral_clip": Item(
        matrices("W", low=0.2, high=0.4),
        lambda W, low, high: spectral(W, lambda s: s.clamp(low, high)),
    ),
    "nn.clipped_decay": Item(
        matrices("W", rate=0.2, cap=0.3),
        lambda W, rate, cap: spectral(W, lambda s: (1 - rate) * s + rate * s.clamp(max=cap)),
    ),
    "nn.stiefel": Item(
        matrices("W", scale=0.7, coefficients="exact"), lambda W, scale, **_: scale * polar(W)
    ),
    "nn.embed_cap": Item(matrices("E", inflation=4.0), embedded),
    "nn.after_step": Item(
        matrices("W", "G", cap=0.4), lambda W, G, cap: capped(cap)(W - 0.5 * G), stepped
    ),
    "nn.constrain_": Item(
        matrices("W"), lambda W: capped(0.5 * math.sqrt(W.shape[0] / W.shape[1]))(W), constrained
    ),
    "nn.spectral_init_": Item(
        lambda shape, _: {"shape": shape, "scale": 2.0}, drawn, initialized, rtol=1e-3
    ),
    "nn.spectral_scale": Item(matrices("W"), lambda W: (W.shape[0] / W.shape[1]) ** 0.5),
    "nn.jacobian_square": Item(linear_maps, noise_of, square, ("A",), rtol=1e-7),
    "nn.jacobian_nuclear_penalty": Item(linear_maps, penalty_of, penalty, ("A", "B"), rtol=1e-7),
}  # fmt: skip
