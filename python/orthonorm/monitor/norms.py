"""Norms of a (batch of) matrices: sigma_1, Frobenius, nuclear, and three operator norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check
from ..exact import polar_exact
from ..ops.normalize import accumulator
from ..ops.scaling import frobenius as frobenius_of
from ..spectral import spectral_norm
from .shards import part_norms, spread_of

SPECTRUM_LIMIT = 256  # longest short side for which an SVD is faster than iterations on a CPU


def flat(X: Tensor) -> Tensor:
    """Reshape (..., 1, 1) to (...)."""
    return X.squeeze(-1).squeeze(-1)


def singular_values(X: Tensor) -> Tensor:
    """sigma_1 >= sigma_2 >= ... of every matrix: an SVD without vectors.

    Args:
        X: (..., m, n).

    Returns: (..., min(m, n)), float64 if X is, else float32. A matrix that is not finite gives NaN
    and does not affect others of the batch. Cost: 8/3 n^3 operations and more; for small matrices.
    Source: Golub and Van Loan, Matrix Computations (2013), section 8.6.
    """
    check.tensor("singular_values", "X", X, min_dim=2)
    A = X.detach().to(accumulator(X))
    finite = A.isfinite().flatten(-2).all(-1)
    sigma = torch.linalg.svdvals(torch.where(finite[..., None, None], A, 0.0))
    return torch.where(finite.unsqueeze(-1), sigma, torch.nan)


def sigma_1(X: Tensor, steps: int = 32, limit: int = SPECTRUM_LIMIT) -> Tensor:
    """max |X v| / |v|, by an SVD if the short side is at most `limit`, else by power iteration.

    Args:
        X: (..., m, n). For a DTensor cut by rows or columns, each rank multiplies its part and
            vectors are summed; all of its ranks must call.
        steps: power steps, one pass over X each. They give a lower bound of sigma_1 with relative
            error (sigma_2 / sigma_1)^(4 steps).
        limit: longest short side for the SVD; 0 always iterates.

    Returns: (...), float64 if X is, else float32. Cost: an SVD without vectors, or steps passes.
    Source: Golub and Van Loan, Matrix Computations (2013), sections 2.3 and 8.2.
    """
    check.tensor("sigma_1", "X", X, min_dim=2)
    if spread := spread_of(X):
        check.integer("sigma_1", "steps", steps, 1)
        return part_norms([X], spread, steps, [None]).top[0]
    if min(X.shape[-2:]) <= limit:
        return singular_values(X)[..., :1].sum(-1)  # 0 for a matrix without entries
    return spectral_norm(X.detach(), steps)


def frobenius(X: Tensor) -> Tensor:
    """(sum_ij X_ij^2)^(1/2), without overflow.

    Args:
        X: (..., m, n).

    Returns: (...), float64 if X is, else float32. Cost: one pass. Source: Golub and Van Loan,
    Matrix Computations (2013), section 2.3.
    """
    check.tensor("frobenius", "X", X, min_dim=2)
    return flat(frobenius_of(X.detach())).to(accumulator(X))


def nuclear_norm(X: Tensor, sigma: Tensor | None = None, limit: int = SPECTRUM_LIMIT) -> Tensor:
    """sum_i sigma_i = <X, U V^T>: by an SVD for small matrices, else by the polar factor.

    Args:
        X: (..., m, n).
        sigma: its singular values (..., min(m, n)), if they are known.
        limit: longest short side for the SVD; above it `orthonorm.polar_exact` computes U V^T by
            about 60 matrix products.

    Returns: (...), float64 if X is, else float32. Cost: an SVD without vectors, or the products.
    Source: N. Higham, Functions of Matrices (2008), chapter 8.
    """
    check.tensor("nuclear_norm", "X", X, min_dim=2)
    if sigma is None and min(X.shape[-2:]) > limit:
        A = X.detach().to(accumulator(X))
        return (A.double() * polar_exact(A).factor).sum((-2, -1)).to(A.dtype)
    return (singular_values(X) if sigma is None else sigma).sum(-1)


def rms_to_rms(X: Tensor, top: Tensor | None = None) -> Tensor:
    """max RMS(X v) / RMS(v) = sigma_1 sqrt(n / m), for a layer y = X v.

    Args:
        X: (..., m, n) = (fan_out, fan_in).
        top: its sigma_1 (...), if it is known.

    Returns: (...). Cost: that of `sigma_1`. Source: arXiv:2409.20325; logged by
    github.com/SDLAML/disco.
    """
    check.tensor("rms_to_rms", "X", X, min_dim=2)
    m, n = X.shape[-2:]
    return (sigma_1(X) if top is None else top) * math.sqrt(n / max(m, 1))


def one_to_rms(X: Tensor) -> Tensor:
    """max RMS(X v) / |v|_1 = max_j |X_:j|_2 / sqrt(m): the largest column, for embeddings.

    Args:
        X: (..., m, n). The vectors of a torch embedding are rows: pass its transpose.

    Returns: (...). Cost: one pass. Source: arXiv:2409.20325.
    """
    check.tensor("one_to_rms", "X", X, min_dim=2)
    return _longest(X, -2) / math.sqrt(max(X.shape[-2], 1))


def rms_to_inf(X: Tensor) -> Tensor:
    """max |X v|_inf / RMS(v) = max_i |X_i:|_2 sqrt(n): the largest row, for output layers.

    Args:
        X: (..., m, n).

    Returns: (...). Cost: one pass. Source: arXiv:2409.20325; its optimum for output layers under
    Scion is about 2^7, whatever model and data (arXiv:2510.03871).
    """
    check.tensor("rms_to_inf", "X", X, min_dim=2)
    return _longest(X, -1) * math.sqrt(X.shape[-1])


def _longest(X: Tensor, dim: int) -> Tensor:
    """Return the largest length of the vectors along `dim`; 0 if there are none."""
    lengths = torch.linalg.vector_norm(X.detach(), dim=dim, dtype=accumulator(X))
    if lengths.shape[-1] == 0:
        return lengths.new_zeros(lengths.shape[:-1])
    return lengths.amax(-1)
