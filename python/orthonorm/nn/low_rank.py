"""Low-rank adapters and task vectors: their one real step by polar factors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..exact import polar_exact


@torch.no_grad()
def nuclear_norm(X: Tensor) -> Tensor:
    """sum_i sigma_i = <X, msign(X)>, without an SVD.

    Shapes: X is (..., m, n), the result (...), float64 if X is, else float32. Cost: a
    `polar_exact`, some 60 products. Source: N. Higham, Functions of Matrices (2008), chapter 8.
    """
    check.tensor("nuclear_norm", "X", X, min_dim=2)
    A = X.to(torch.promote_types(X.dtype, torch.float32))
    return (A * polar_exact(A).factor).sum((-2, -1))


@torch.no_grad()
def orthonormalize_lora(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B (A A^T)^(1/2), (A A^T)^(-1/2) A: the same product B A, the rows of A orthonormal.

    FedSVD refactors the averaged adapter by an SVD; once A has orthonormal rows that only rotates
    it, so this first step is the one that changes anything, and needs the polar factor of A alone.

    Args:
        B: (..., m, r).
        A: (..., r, n), full rank, r <= n.

    Returns: the new B and A. Cost: a `polar_exact` of A, 2 r^2 (m + n) operations.

    Source: arXiv:2505.12805.
    """
    op = "orthonormalize_lora"
    check.tensor(op, "A", A, min_dim=2)
    check.tensor(op, "B", B, min_dim=2)
    r, n = A.shape[-2:]
    check.equal_shape(op, "B", B, (*A.shape[:-2], B.shape[-2], r))
    if r > n:
        raise ValueError(f"{op}: A must have no more rows than columns, got {check.shape(A)}")
    Q = polar_exact(A).factor
    H = A @ Q.mT
    return B @ (0.5 * (H + H.mT)), Q


@torch.no_grad()
def star(delta: Tensor, keep: float = 0.4, rank: int | None = None, steps: int = 10) -> Tensor:
    """U_r S_r V_r^T sum(S) / sum(S_r): the leading directions with all of the nuclear norm.

    What STAR makes of each task vector (fine-tuned minus base weights) before they are averaged.

    Args:
        delta: (m, n).
        keep: r is the fewest directions whose singular values add up to this part of all; needs the
            SVD. (The published code keeps one more.)
        rank: r itself; `keep` is not used and no SVD taken: `steps` subspace iterations with polar
            factors, nuclear norms by polar factors.

    Returns: (m, n). Cost: an SVD; or 4 m n r operations a step, and two nuclear norms.

    Source: arXiv:2502.10339 (github.com/IBM/STAR).
    """
    op = "star"
    check.tensor(op, "delta", delta, min_dim=2)
    A = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if rank is None:
        check.number(op, "keep", keep, 0.0, 1.0)
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        r = int((s.cumsum(0) < keep * s.sum()).sum()) + 1
        low, kept = (U[:, :r] * s[:r]) @ Vh[:r], s[:r].sum()
        factor = s.sum() / kept if kept > 0 else 1.0
    else:
        check.integer(op, "rank", rank, 1)
        check.integer(op, "steps", steps, 1)
        low = _leading(A, min(rank, *A.shape), steps)
        kept = nuclear_norm(low)
        factor = torch.where(kept > 0, nuclear_norm(A) / kept, 1.0)
    return (low * factor).to(delta.dtype)


def _leading(A: Tensor, rank: int, steps: int) -> Tensor:
    """Q Q^T A, Q the leading left singular directions by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(A.shape[1], rank, generator=generator, dtype=torch.float64)
    Q = polar_exact(A @ start.to(A)).factor
    for _ in range(steps):
        Q = polar_exact(A @ polar_exact(A.mT @ Q).factor).factor
    return Q @ (Q.mT @ A)
