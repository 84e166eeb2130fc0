"""The public K1 functions: bands, forms, scale invariance, refusals, the exact polar factor."""

from __future__ import annotations

import orthonorm
import pytest
import torch
from orthonorm import coefficients
from torch import Tensor

SHAPES = ((1, 1), (1, 9), (9, 1), (30, 50), (50, 30), (140, 200), (3, 40, 140))
GOOD = ("keller", "you5", "you6", "polar_express", "polar_express_1.02", "cubic5", "deepseek_v4")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def matrix(m: int, n: int, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    k = min(m, n)
    U = torch.linalg.qr(randn(m, k, dtype=torch.float64, seed=1))[0]
    V = torch.linalg.qr(randn(n, k, dtype=torch.float64, seed=2))[0]
    return ((U * sigma.double()) @ V.mT).to(dtype)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("method", ["direct", "gram"])
def test_singular_values_lie_in_the_band(name: str, method: str) -> None:
    if method == "gram" and name == "deepseek_v4":
        pytest.skip("refused in Gram form without enough restarts")
    for shape in SHAPES:
        X = randn(*shape)
        s = torch.linalg.svdvals(X.double())
        s = s / torch.linalg.matrix_norm(X.double(), keepdim=True).squeeze(-1)
        low, high = coefficients.resolve(name).image(s.min().item() * 0.999, s.max().item())
        got = torch.linalg.svdvals(
            orthonorm.polar(X, name, method=method, precision="full").double()
        )
        assert low - 2e-3 <= got.min() and got.max() <= high + 2e-3  # float32, condition <= 400


@pytest.mark.parametrize("name", sorted(coefficients.COEFFICIENTS))
def test_rank_one_keeps_its_direction(name: str) -> None:
    if name == "aol_flipping":
        with pytest.raises(ValueError, match="reverses"):
            orthonorm.polar(randn(4, 5), name)
        return
    u, v = randn(20, 1), randn(1, 150)
    X = u @ v
    Q = orthonorm.polar(X, name, precision="float64").double()
    exact = coefficients.COEFFICIENTS[name].prescale == "frobenius"  # AOL scales rows apart
    assert (Q * X).sum() / (Q.norm() * X.norm()) > (0.99 if exact else 0.6)
    assert Q.norm() > 0.6


@pytest.mark.parametrize("k", [-140, -60, -1, 3, 90, 120])
def test_scale_invariance_is_bitwise(k: int) -> None:
    for shape in ((6, 9), (40, 20), (140, 150)):
        X = torch.round(randn(*shape) * 4) / 4  # few bits, so that 2^k X is exact
        scaled = torch.ldexp(X.double(), torch.tensor(k)).float()
        assert torch.equal(torch.ldexp(scaled.double(), torch.tensor(-k)).float(), X)
        for precision in ("float32", "bfloat16", "float64"):
            a = orthonorm.polar(X, precision=precision)
            assert torch.equal(a, orthonorm.polar(scaled, precision=precision))


def test_transpose_batch_list_and_strides() -> None:
    X = randn(5, 24, 40)
    Q = orthonorm.polar(X, "keller")
    torch.testing.assert_close(orthonorm.polar(X.mT, "keller"), Q.mT, atol=1e-5, rtol=1e-5)
    listed = orthonorm.polar([X[0], X[1:3], X[3].mT], "keller")
    assert torch.equal(listed[0], Q[0]) and torch.equal(listed[1], Q[1:3])
    assert torch.equal(orthonorm.polar(X[::2, ::3, 1:], "keller"),
                       orthonorm.polar(X[::2, ::3, 1:].contiguous(), "keller"))  # fmt: skip
    before = X.clone()
    orthonorm.polar(X)
    assert torch.equal(X, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 12), (150, 140)])
def test_zero_empty_and_nonfinite(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert not orthonorm.polar(torch.zeros(shape, dtype=dtype)).any()
    for empty in ((0, *shape), (0, 5), (5, 0)):
        assert orthonorm.polar(torch.zeros(empty, dtype=dtype)).shape == empty
    X = randn(3, *shape, dtype=dtype)
    clean = orthonorm.polar(X)
    X[1, 2, 3] = float("nan")
    Q = orthonorm.polar(X)
    assert Q.dtype == dtype
    assert torch.equal(Q[0], clean[0]) and torch.equal(Q[2], clean[2])
    assert Q[1].isnan().any()


def test_eps_is_torchs_clamp() -> None:
    X = 1e-9 * randn(12, 30)
    got = orthonorm.polar(X, "keller", eps=1e-7, precision="float64")
    wanted = orthonorm.odd_polynomial(X.double() / 1e-7, [(3.4445, -4.7750, 2.0315)] * 5)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(9, 20), (20, 9), (140, 160)])
def test_odd_polynomial_is_the_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    triples = [(0.9, -0.3, 0.0), (-1.1, 0.4, 0.05)]
    X = randn(*shape, dtype=torch.float64) / 20
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(
        orthonorm.odd_polynomial(X, triples), (U * s) @ Vh, atol=1e-13, rtol=1e-12
    )


def test_refusals_name_rule_and_value() -> None:
    X = randn(6, 8)
    for kwargs, kind, word in (
        (dict(coefficients="kelller"), ValueError, "kelller"),
        (dict(method="grams"), ValueError, "grams"),
        (dict(precision="fp8"), ValueError, "fp8"),
        (dict(method="gram", precision="bfloat16"), ValueError, "bfloat16"),
        (dict(coefficients="polar_express_raw", precision="bfloat16"), ValueError, "polar_express"),
        (dict(coefficients="you5", method="gram", restarts=[], precision="float16"), ValueError,
         "restarts"),
        (dict(steps=0), ValueError, "steps"),
        (dict(scale="l2"), ValueError, "l2"),
        (dict(eps=-1.0), ValueError, "eps"),
        (dict(restarts="none"), TypeError, "restarts"),
    ):  # fmt: skip
        with pytest.raises(kind, match=word):
            orthonorm.polar(X, **kwargs)
    for bad, kind in ((randn(5), ValueError), (X.to(torch.complex64), TypeError),
                      (X.to_sparse(), TypeError), ([1.0], TypeError), (3, TypeError)):  # fmt: skip
        with pytest.raises(kind):
            orthonorm.polar(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (33, 33), (64, 150), (150, 64)])
def test_exact_is_the_polar_factor_to_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    m, n = shape
    k, eps = min(m, n), torch.finfo(dtype).eps
    for power in (0, -3, -6, -12):
        if power == -12 and dtype == torch.float32:
            continue
        X = matrix(m, n, torch.logspace(0, power, k, dtype=torch.float64), dtype)
        r = orthonorm.polar_exact(X)
        Q, A = r.factor.double(), X.double()
        Q, A = (Q, A) if m <= n else (Q.mT, A.mT)
        H = A @ Q.mT
        unit = max(m, n) * eps
        assert (Q @ Q.mT - torch.eye(k).double()).norm() < unit
        assert (A - 0.5 * (H + H.mT) @ Q).norm() / A.norm() < unit
        assert torch.linalg.eigvalsh(0.5 * (H + H.mT)).min() > -unit * A.norm()
        assert r.info == 0 and r.orthogonality < 1 and r.residual < 1
        true = torch.linalg.svdvals(A)
        assert 0.2 < r.rcond / (true[-1] / true[0]) < 5


def test_exact_flags() -> None:
    deficient = torch.zeros(6, 8)
    deficient[0, 0] = 3.0
    X = torch.stack([randn(6, 8), deficient, torch.full((6, 8), torch.inf), 1e-40 * randn(6, 8)])
    r = orthonorm.polar_exact(X)
    assert r.info.tolist() == [0, 1, 2, 0]
    assert r.rcond[1] == 0
    alone = orthonorm.polar_exact(X[0])
    torch.testing.assert_close(r.factor[0], alone.factor, atol=1e-6, rtol=0)
    assert torch.equal(orthonorm.polar(X[0], precision="exact"), alone.factor)
