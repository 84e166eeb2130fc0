"""polar_exact: orthogonality, residual, condition and flags, against longdouble and the SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from orthonorm import PolarExact, polar, polar_exact
from orthonorm.exact import OWN_ROUNDING
from polar_judge import matrix
from torch import Tensor

SHAPES = ((1, 1), (1, 9), (9, 1), (2, 2), (33, 33), (64, 150), (150, 64))
KINDS = {  # spectrum -> sigma_min / sigma_max; float32 resolves nothing below 1e-7
    "gaussian": None, "flat": 1.0, "log 1e-3": 1e-3, "log 1e-5": 1e-5, "condition 1e-6": 1e-6,
    "one tiny": 1e-6, "one large": 1e-5, "clustered": 1e-3, "condition 1e-12": 1e-12,
}  # fmt: skip
SINGLE_AND_DOUBLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def unit(X: Tensor) -> float:
    """The unit of what is promised: (max(m, n) + 16) eps."""
    return (max(X.shape[-2:]) + OWN_ROUNDING) * torch.finfo(X.dtype).eps


def wide(x: Tensor) -> np.ndarray:
    """In longdouble, so that checking a float64 result rounds less than making it did."""
    a = x.numpy().astype(np.longdouble)
    return a if a.shape[0] <= a.shape[1] else a.T


def check_exact(X: Tensor, r: PolarExact) -> None:
    Q, A = wide(r.factor), wide(X)
    A = A / np.sqrt((A * A).sum())
    H = A @ Q.T
    H = (H + H.T) / 2
    limit = unit(X)
    assert np.sqrt(((Q @ Q.T - np.eye(len(Q))) ** 2).sum()) < limit
    assert np.sqrt(((A - H @ Q) ** 2).sum()) < limit
    assert np.linalg.eigvalsh(H.astype(float)).min() > -limit  # positive: no direction is reversed
    assert r.info == 0 and r.orthogonality < 1 and r.residual < 1
    assert r.factor.is_contiguous() and r.factor.dtype == X.dtype


RESOLVED = [(k, d) for k, ratio in KINDS.items() for d in (torch.float32, torch.float64)
            if d == torch.float64 or ratio is None or ratio >= 1e-7]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), RESOLVED, ids=str)
def test_polar_factor_to_rounding(kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        X = matrix(kind, *shape).to(dtype)
        r = polar_exact(X)
        check_exact(X, r)
        U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        # perturbation theory: backward errors of ours and, in float64, of the SVD's
        allowed = 4 * unit(X) * s.norm() / s[-1]
        assert (r.factor.double() - U @ Vh).norm() <= allowed
        true = s[-1] / s[0]
        # from above, but for rounding and a root found to 1e-7, over a bound of sigma_1: a Schatten
        # norm of order 128, at most n^(1/128) sigma_1, with its slack
        least = (true * (1 - 1e-7) - unit(X)) / (len(s) ** (1 / 128) * (1 + 4 * unit(X)))
        assert least < r.rcond.double() < 5 * true + unit(X), shape


def test_flags() -> None:
    deficient = torch.zeros(6, 8)
    deficient[0, 0] = 3.0
    X = torch.stack([matrix("gaussian", 6, 8).float(), deficient, torch.full((6, 8), torch.inf)])
    X = torch.cat([X, X[:1] * 1e-40, torch.zeros(1, 6, 8)])
    r = polar_exact(X)
    assert r.info.tolist() == [0, 1, 2, 0, 1] and r.info.dtype == torch.int32
    assert r.rcond[1] == r.rcond[2] == r.rcond[4] == 0
    assert not r.factor[4].any() and r.factor[1].isfinite().all()
    X[2, 3, 4] = torch.nan
    assert torch.equal(polar_exact(X).factor[[0, 1, 3, 4]], r.factor[[0, 1, 3, 4]])


@SINGLE_AND_DOUBLE
def test_batches_layouts_and_scales(dtype: torch.dtype) -> None:
    X = torch.round(matrix("gaussian", 12, 30, batch=(2, 3)) * 64).to(dtype)
    r = polar_exact(X)
    assert r.factor.shape == X.shape and all(t.shape == (2, 3) for t in r[1:])
    for i in range(2):
        for j in range(3):
            check_exact(X[i, j], PolarExact(*(t[i, j] for t in r)))
            alone = polar_exact(X[i, j]).factor
            assert (alone - r.factor[i, j]).norm() <= 4 * unit(X) / r.rcond[i, j]
    transposed = polar_exact(X.mT.contiguous().mT)
    assert (transposed.factor - r.factor).norm() <= 4 * unit(X) / r.rcond.min()
    for x, y in zip(X[0].mT, r.factor[0].mT, strict=True):
        assert (polar_exact(x.contiguous()).factor - y).norm() <= 4 * unit(X) / r.rcond.min()
    for k in (-60, 60) if dtype == torch.float32 else (-900, 900):
        assert torch.equal(polar_exact(X * 2.0**k).factor, r.factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    X = matrix("log 1e-3", 20, 50).to(dtype)
    r, single = polar_exact(X), polar_exact(X.float())
    assert torch.equal(r.factor, single.factor.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(r[1:], single[1:], strict=True))


def test_polar_calls_it() -> None:
    X = [matrix("gaussian", 6, 8).float(), matrix("gaussian", 9, 4).double()]
    for Q, x in zip(polar(X, precision="exact"), X, strict=True):
        assert torch.equal(Q, polar_exact(x).factor)
    assert torch.equal(polar(X[0], "keller", precision="exact"), polar_exact(X[0]).factor)


def test_refusals() -> None:
    for bad, error in (
        (torch.ones(5), ValueError), (torch.ones(3, 3).int(), TypeError), (None, TypeError),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError), (torch.eye(3).to_sparse(), TypeError),
        ([torch.ones(3, 3)], TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"^polar_exact: X must"):
            polar_exact(bad)
