"""Effective number of directions of a matrix: ranks, entropies and tails of its spectrum.

Every function takes X (..., m, n). Those that need all singular values accept them as `sigma`, so
that one SVD serves all. lambda_i = sigma_i^2 are the eigenvalues of X^T X. For those of a
covariance of features (tokens x dimensions), subtract the mean of the tokens first. A matrix of
zeros has rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops.normalize import accumulator
from ..ops.words import gram
from .norms import frobenius, sigma_1, singular_values


def _spectrum(name: str, X: Tensor, sigma: Tensor | None) -> Tensor:
    """Return the singular values divided by the largest; all 0 for a matrix of zeros."""
    check.tensor(name, "X", X, min_dim=2)
    s = singular_values(X) if sigma is None else sigma
    return torch.where(s == 0, 0.0, s / s[..., :1])


def _shares(x: Tensor) -> Tensor:
    """Return x divided by its sum; zeros stay zero."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, x / total)


def _exp_entropy(p: Tensor) -> Tensor:
    """Return exp(-sum_i p_i log p_i); 0 if all of p is 0."""
    h = torch.special.entr(p).sum(-1).exp()
    return torch.where((p == 0).all(-1), 0.0, h)


def stable_rank(X: Tensor, top: Tensor | None = None, size: Tensor | None = None) -> Tensor:
    """|X|_F^2 / sigma_1^2, from 1 to min(m, n).

    Args:
        X: (..., m, n).
        top: its sigma_1 (...), if it is known. A lower bound of sigma_1 gives an upper bound of the
            rank.
        size: its |X|_F (...), if it is known.

    Returns: (...), float64 if X is, else float32. Cost: one pass, and `sigma_1`. Source:
    arXiv:1906.04659.
    """
    check.tensor("stable_rank", "X", X, min_dim=2)
    top = sigma_1(X) if top is None else top
    size = frobenius(X) if size is None else size
    return torch.where(top == 0, 0.0, (size / top).square())


def hard_rank(X: Tensor, size: Tensor | None = None) -> Tensor:
    """(sum lambda)^2 / sum lambda^2 = |X|_F^4 / |X X^T|_F^2: participation ratio, without an SVD.

    Args:
        X: (..., m, n).
        size: its |X|_F (...), if it is known.

    Returns: (...), float64 if X is, else float32. Cost: one Gram product on the short side.
    Source: "Spectral Scaling Laws in Language Models" (feed-forward utilization).
    """
    check.tensor("hard_rank", "X", X, min_dim=2)
    size = (frobenius(X) if size is None else size)[..., None, None]
    A = X.detach().to(size.dtype) / torch.where(size == 0, 1.0, size)
    G = gram(A if A.shape[-2] <= A.shape[-1] else A.mT)
    squares = torch.linalg.vector_norm(G, dim=(-2, -1)).square()
    return torch.where(squares == 0, 0.0, 1 / squares)


def soft_rank(X: Tensor, sigma: Tensor | None = None) -> Tensor:
    """exp(-sum p log p) with p = lambda / sum lambda.

    Args:
        X: (..., m, n).
        sigma: its singular values (..., min(m, n)), if they are known.

    Returns: (...). Cost: an SVD without vectors. Sources: "Spectral Scaling Laws in Language
    Models"; called RankMe in "Tracing the Representation Geometry of Language Models".
    """
    return _exp_entropy(_shares(_spectrum("soft_rank", X, sigma).square()))


def effective_rank(X: Tensor, sigma: Tensor | None = None) -> Tensor:
    """exp(-sum p log p) with p = sigma / sum sigma.

    Args:
        X: (..., m, n).
        sigma: its singular values (..., min(m, n)), if they are known.

    Returns: (...). Cost: an SVD without vectors. Source: "How Instruction and Reasoning Data shape
    Post-Training" (of per-layer gradients).
    """
    return _exp_entropy(_shares(_spectrum("effective_rank", X, sigma)))


def rankme(X: Tensor, sigma: Tensor | None = None, eps: float = 1e-7) -> Tensor:
    """exp(-sum p log p) with p = sigma / sum sigma + eps, of features X (tokens x dimensions).

    `effective_rank` with the constant eps of the original, which shifts it by about
    n eps |log eps|.

    Args:
        X: (..., tokens, dimensions), not centred.
        sigma: its singular values, if they are known.

    Returns: (...). Cost: an SVD without vectors. Source: arXiv:2210.02885.
    """
    check.number("rankme", "eps", eps, 0.0)
    p = _shares(_spectrum("rankme", X, sigma))
    h = torch.special.entr(p + eps).sum(-1).exp()
    return torch.where((p == 0).all(-1), 0.0, h)


def spectral_concentration(X: Tensor, k: int = 1, sigma: Tensor | None = None) -> Tensor:
    """sum_(i <= k) lambda_i / sum_i lambda_i: the share of the k largest directions.

    Args:
        X: (..., m, n).
        k: directions counted.
        sigma: the singular values, if they are known.

    Returns: (...), in [0, 1]. Cost: an SVD without vectors. Source: "Spectral Scaling Laws in
    Language Models".
    """
    check.integer("spectral_concentration", "k", k, 1)
    p = _shares(_spectrum("spectral_concentration", X, sigma).square())
    return p[..., :k].sum(-1)


def alpha_req(
    X: Tensor, sigma: Tensor | None = None, first: int = 1, last: int | None = None
) -> Tensor:
    """alpha of lambda_k ~ k^-alpha: least squares of log lambda_k on log k, weighted by 1 / k.

    Args:
        X: (..., tokens, dimensions).
        sigma: its singular values (..., r), if they are known.
        first, last: the range of k to fit, counted from 1. The default is all; the original takes
            11 to 100 of hundreds. Any k whose lambda is below rounding, (r eps sigma_1)^2, is left
            out.

    Returns: (...); NaN if fewer than two k are left. Cost: an SVD without vectors.
    Source: alpha-ReQ (NeurIPS 2022), the fit of Stringer et al. 2019.
    """
    name = "alpha_req"
    check.integer(name, "first", first, 1)
    if last is not None:
        check.integer(name, "last", last, first + 1)
    s = _spectrum(name, X, sigma)
    floor = max(s.shape[-1], 1) * torch.finfo(s.dtype).eps
    k = torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=torch.float64)
    s = s[..., first - 1 : last].double()
    k = k[first - 1 : last]
    usable = ~(s <= floor)  # NaN counts as usable, and makes the fit NaN
    weight = usable / k
    x, y = k.log(), torch.where(usable, 2 * s.log(), 0.0)
    total = weight.sum(-1, keepdim=True)
    x = x - (weight * x).sum(-1, keepdim=True) / total
    slope = (weight * x * y).sum(-1) / (weight * x.square()).sum(-1)
    return torch.where(usable.sum(-1) < 2, torch.nan, -slope).to(accumulator(X))


def farms_alpha(
    X: Tensor, rows: int = 100, ratio: float = 2.0, windows: int = 10, share: float = 0.5
) -> Tensor:
    """1 + k / sum_(i <= k) log(lambda_i / lambda_min): power-law tail of windows of one shape.

    Pools the squared singular values of up to windows x windows submatrices, evenly spread over X.
    Each is (r, ratio r), with the largest r up to `rows` that fits both sides; one shape for all
    makes the result independent of the aspect ratio of X. lambda_min is the median of the pooled
    values, and lambda_1..k are those from it upwards. The scale of X does not matter.

    Args:
        X: (..., m, n).
        rows: most rows of a window (100).
        ratio: columns over rows of a window (2.0).
        windows: windows along each side (10).
        share: share of the pooled values that lie below lambda_min (0.5: the median).

    Returns: (...); NaN if X has no room for a window. Cost: windows^2 SVDs without vectors of
    rows x (ratio rows). Source: arXiv:2506.06280, github.com/HUST-AI-HYZ/FARMS.
    """
    name = "farms_alpha"
    check.tensor(name, "X", X, min_dim=2)
    check.integer(name, "rows", rows, 1)
    check.integer(name, "windows", windows, 1)
    check.number(name, "ratio", ratio, 1e-3, 1e3)
    check.fraction(name, "share", share)
    m, n = X.shape[-2:]
    r = min(rows, m, int(n / ratio))
    c = int(r * ratio)
    if r < 1 or c < 1:
        return X.new_full(X.shape[:-2], torch.nan, dtype=accumulator(X))
    pieces = [
        X[..., i : i + r, j : j + c]
        for i in _starts(m - r, windows)
        for j in _starts(n - c, windows)
    ]
    pooled = torch.cat([2 * singular_values(x).double().log() for x in pieces], -1)
    logs = pooled.sort(-1).values  # NaN sorts last, so it makes the mean NaN
    logs = logs[..., int(logs.shape[-1] * share) :]
    return (1 + 1 / (logs - logs[..., :1]).mean(-1)).to(accumulator(X))


def _starts(room: int, windows: int) -> list[int]:
    """Return up to `windows` evenly spread offsets from 0 to `room`."""
    count = min(windows, room + 1)
    return [room * i // max(count - 1, 1) for i in range(count)]


def matrix_nuclear_norm(X: Tensor) -> Tensor:
    """sum of the D largest column norms of the row-normalized, centred X, D = min(tokens, dims).

    Subtracts the column means, divides each row by its length (a zero row stays zero), and takes
    the lengths of the columns. This approximates the nuclear norm by L_(1,2), without an SVD.
    Divide by the number of tokens to compare responses of different lengths.

    Args:
        X: (..., tokens, dimensions).

    Returns: (...), float64 if X is, else float32. Cost: three passes. Source: "Large Language
    Model Evaluation via Matrix Nuclear-Norm", github.com/MLGroupJLU/MatrixNuclearNorm.
    """
    check.tensor("matrix_nuclear_norm", "X", X, min_dim=2)
    A = X.detach().to(accumulator(X))
    A = A - A.mean(-2, keepdim=True)
    lengths = torch.linalg.vector_norm(A, dim=-1, keepdim=True)
    A = torch.where(lengths == 0, 0.0, A / lengths)
    columns = torch.linalg.vector_norm(A, dim=-2)
    return columns.topk(min(X.shape[-2:]), dim=-1).values.sum(-1)
