"""Nuclear norms, low-rank adapters and task vectors, by polar factors in place of SVDs."""

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
    """B (A A^T)^(1/2), (A A^T)^(-1/2) A: the same product B A, with orthonormal rows of the new A.

    FedSVD refactors the averaged adapter by an SVD. Once A has orthonormal rows, its SVD only
    rotates the factors. This function is the step before that; it needs the polar factor of A only.

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
    """U_r S_r V_r^T sum(S) / sum(S_r): the r leading directions, scaled to the full nuclear norm.

    STAR does this to each task vector (fine-tuned minus base weights) before it averages them.

    Args:
        delta: (m, n).
        keep: a share of sum(S), in [0, 1]; r is the fewest directions that reach it. Takes an SVD.
            (The published code keeps one direction more.)
        rank: r itself. Then `keep` is not used and no SVD is taken; polar factors give the
            directions, by subspace iteration, and the nuclear norms.
        steps: subspace iterations, used with `rank`.

    Returns: (m, n). Cost: an SVD; or 4 m n r operations per step, and two nuclear norms.

    Source: arXiv:2502.10339 (github.com/IBM/STAR).
    """
    op = "star"
    check.tensor(op, "delta", delta, min_dim=2)
    A = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if rank is None:
        check.number(op, "keep", keep, 0.0, 1.0)
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        r = int((s.cumsum(0) < keep * s.sum()).sum()) + 1
        low, low_norm = (U[:, :r] * s[:r]) @ Vh[:r], s[:r].sum()
        factor = s.sum() / low_norm if low_norm > 0 else 1.0
    else:
        check.integer(op, "rank", rank, 1)
        check.integer(op, "steps", steps, 1)
        low = _leading(A, min(rank, *A.shape), steps)
        low_norm = nuclear_norm(low)
        factor = torch.where(low_norm > 0, nuclear_norm(A) / low_norm, 1.0)
    return (low * factor).to(delta.dtype)


def _leading(A: Tensor, rank: int, steps: int) -> Tensor:
    """Return Q Q^T A; subspace iteration gives Q, the `rank` leading left singular directions."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(A.shape[1], rank, generator=generator, dtype=torch.float64)
    Q = polar_exact(A @ start.to(A)).factor
    for _ in range(steps):
        Q = polar_exact(A @ polar_exact(A.mT @ Q).factor).factor
    return Q @ (Q.mT @ A)
