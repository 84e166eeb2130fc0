"""The subspace power method: a small symmetric tensor as a sum of rank-one tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check

START_TRIES = 20  # most restarts of an ascent that is nearly orthogonal to the subspace


class SymmetricRankOnes(NamedTuple):
    """T ~ sum_i values[i] vectors[:, i]^(x m), and |T - that|_F / |T|_F."""

    values: Tensor
    vectors: Tensor
    residual: Tensor


def subspace_power_method(
    T: Tensor,
    rank: int,
    steps: int = 1000,
    tol: float = 1e-12,
    generator: torch.Generator | None = None,
) -> SymmetricRankOnes:
    """T = sum_i lambda_i a_i^(x m): x <- normalize(P_A[x^(x m/2)] x^(m/2 - 1) + gamma x), deflated.

    The symmetric tensor of even order m is flattened to L^(m/2) x L^(m/2). A is the span of its
    `rank` leading eigenvectors. Every a_i^(x m/2) lies in A, and every a_i is a maximum of
    |P_A[x^(x m/2)]| on the sphere. The shift gamma = (m/2 - 1) sqrt(f (1 - f)), f = |P_A[x^...]|^2
    clamped to [1/2, 1], makes the ascent monotone. Each term found is subtracted, which deflates
    the eigenvalues D: lambda = 1 / (alpha^T D^-1 alpha), alpha the coordinates of a^(x m/2) in A.

    Args:
        T: (L, ..., L), m = 4, 6, ... dimensions, symmetric in all of them.
        rank: number of terms, at most about L^(m/2) / (m/2)!.
        steps: most power steps per term.
        tol: a term is found when a step moves x by at most this.
        generator: draws the starts; None takes a fixed seed.

    Returns: values (rank,), vectors (L, rank) of length one, and the relative residual. Cost: one
    eigh of L^(m/2), and rank steps products of L^(m/2) x rank. Source: arXiv:1912.04007,
    github.com/joaompereira/SPM.
    """
    name = "subspace_power_method"
    check.tensor(name, "T", T, 4)
    check.integer(name, "rank", rank, 1)
    check.integer(name, "steps", steps, 1)
    check.number(name, "tol", tol, 0.0)
    order, L = T.dim(), T.shape[0]
    if order % 2 or T.shape != (L,) * order:
        raise ValueError(f"{name}: T must have an even number of equal sides, got {tuple(T.shape)}")
    half = order // 2
    size = L**half
    if rank > size:
        raise ValueError(f"{name}: rank must be at most {size}, got {rank}")
    D, V = torch.linalg.eigh(T.detach().reshape(size, size))
    leading = D.abs().argsort(descending=True)[:rank]
    D, V = D[leading], V[:, leading]
    generator = generator or torch.Generator().manual_seed(0)
    values, vectors = [], []
    for left in range(rank, 0, -1):
        x = _ascend(V, half, steps, tol, generator)
        alpha = V.mT @ _power(x, half)
        value = 1 / (alpha.square() / D).sum()
        values.append(value)
        vectors.append(x)
        D, turn = torch.linalg.eigh(torch.diag(D) - value * torch.outer(alpha, alpha))
        keep = D.abs().argsort(descending=True)[: left - 1]
        D, V = D[keep], V @ turn[:, keep]
    made = torch.stack([a * _power(x, order) for a, x in zip(values, vectors, strict=True)]).sum(0)
    residual = torch.linalg.vector_norm(T.flatten() - made) / torch.linalg.vector_norm(T)
    return SymmetricRankOnes(torch.stack(values), torch.stack(vectors, 1), residual)


def _power(x: Tensor, order: int) -> Tensor:
    """Return the tensor power x (x) x (x) ... of this order, flattened."""
    out = x
    for _ in range(order - 1):
        out = torch.outer(out, x).flatten()
    return out


def _ascend(V: Tensor, half: int, steps: int, tol: float, generator: torch.Generator) -> Tensor:
    """Find a local maximum of |V^T x^(x half)| on the unit sphere, by shifted power steps."""
    L = round(V.shape[0] ** (1 / half))
    least, tries = 1e-2 / math.sqrt(L), 0
    x = _start(L, V, generator)
    for _ in range(steps):
        y = V @ (V.mT @ _power(x, half))
        for _ in range(half - 1):  # contract all but one side with x
            y = y.view(-1, L) @ x
        f = float(x @ y)
        if f < least and tries < START_TRIES:
            x, tries = _start(L, V, generator), tries + 1
            continue
        f = min(max(f, 0.5), 1.0)
        new = y + (half - 1) * math.sqrt(f * (1 - f)) * x
        new = new / torch.linalg.vector_norm(new)
        moved = torch.linalg.vector_norm(new - x)
        x = new
        if moved <= tol:
            break
    return x


def _start(L: int, V: Tensor, generator: torch.Generator) -> Tensor:
    x = torch.randn(L, generator=generator, dtype=torch.float64).to(V)
    return x / torch.linalg.vector_norm(x)
