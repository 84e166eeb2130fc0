"""Spectral metrics against the SVD in float64, or against the definition written out."""

from __future__ import annotations

import math
from itertools import product as cartesian

import pytest
import torch
from orthonorm import monitor
from polar_judge import DTYPES, matrix
from torch import Tensor

SHAPES = ((1, 1), (1, 7), (7, 1), (12, 30), (30, 12), (20, 20))
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def oracle(X: Tensor) -> dict[str, Tensor]:
    """Every spectral metric from the singular values, in float64."""
    m, n = X.shape
    s = torch.linalg.svdvals(X.double())
    lam, p = s**2 / (s**2).sum(), s / s.sum()
    q = p + 1e-7
    return {
        "sigma_1": s[0],
        "frobenius": (s**2).sum().sqrt(),
        "nuclear_norm": s.sum(),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "hard_rank": (s**2).sum() ** 2 / (s**4).sum(),
        "soft_rank": torch.exp(-(lam * lam.log()).sum()),
        "effective_rank": torch.exp(-(p * p.log()).sum()),
        "rankme": torch.exp(-(q * q.log()).sum()),
        "spectral_concentration": lam[0],
        "rms_to_rms": s[0] * math.sqrt(n / m),
        "one_to_rms": X.double().norm(dim=0).max() / math.sqrt(m),
        "rms_to_inf": X.double().norm(dim=1).max() * math.sqrt(n),
    }


@EACH_SHAPE
def test_metrics_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    X = matrix("gaussian", *shape)
    for name, want in oracle(X).items():
        torch.testing.assert_close(getattr(monitor, name)(X), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_metrics_in_every_dtype_and_batch(dtype: torch.dtype) -> None:
    """Batches are loops; float32 results of any input are within 1e-5 of the float64 oracle."""
    X = matrix("gaussian", 14, 25, batch=(2, 3)).to(dtype)
    for name in oracle(X[0, 0]):
        got = getattr(monitor, name)(X)
        assert got.shape == (2, 3) and got.dtype == torch.promote_types(dtype, torch.float32)
        want = torch.stack([oracle(x)[name] for x in X.flatten(0, 1)]).view(2, 3)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_large_matrices_iterate_instead() -> None:
    X = matrix("power law", 40, 60)
    s = torch.linalg.svdvals(X)
    torch.testing.assert_close(monitor.sigma_1(X, 40, limit=0), s[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(monitor.nuclear_norm(X, limit=0), s.sum(), rtol=1e-10, atol=0)


def test_operator_norms_are_attained_and_never_exceeded() -> None:
    """max |X v| / |v| in their own norms: over unit vectors, signs, and random directions."""
    X = matrix("gaussian", 6, 9)
    v = torch.cat([torch.eye(9), torch.randn(9, 2000, generator=torch.Generator().manual_seed(0)),
                   torch.linalg.svd(X).Vh.float(), X.mT.float()], 1).double()  # fmt: skip
    rms = lambda x: x.square().mean(0).sqrt()  # noqa: E731
    ratios = {
        "rms_to_rms": rms(X @ v) / rms(v),
        "one_to_rms": rms(X @ v) / v.abs().sum(0),
        "rms_to_inf": (X @ v).abs().amax(0) / rms(v),
    }
    v1 = torch.linalg.svd(X).Vh[:1].mT
    ratios["rms_to_rms"] = torch.cat([ratios["rms_to_rms"], rms(X @ v1) / rms(v1)])
    for name, ratio in ratios.items():
        torch.testing.assert_close(ratio.max(), getattr(monitor, name)(X), rtol=1e-6, atol=0)


def test_alpha_req_finds_the_exponent_and_is_weighted() -> None:
    k = torch.arange(1, 61, dtype=torch.float64)
    for alpha in (0.3, 1.0, 2.5):
        X = torch.diag(k ** (-alpha / 2))
        assert abs(monitor.alpha_req(X) - alpha) < 1e-12
    s = matrix("gaussian", 60, 80)
    lam = torch.linalg.svdvals(s) ** 2
    for first, last in ((1, 60), (11, 50)):
        t = k[first - 1 : last]
        x = torch.stack([-t.log(), torch.ones_like(t)], 1)  # the published normal equations
        w = 1 / t[:, None]
        y = lam[first - 1 : last].log()[:, None]
        want = torch.linalg.solve(x.T @ (x * w), (w * x).T @ y)[0, 0]
        torch.testing.assert_close(monitor.alpha_req(s, None, first, last), want, rtol=1e-10,
                                   atol=0)  # fmt: skip
    low = matrix("rank n/2", 20, 30)
    assert monitor.alpha_req(low).isfinite()  # the null space is left out
    assert monitor.alpha_req(torch.ones(3, 3)).isnan()


def test_farms_is_the_hill_estimate_of_pooled_windows() -> None:
    X = matrix("gaussian", 50, 90)
    rows, cols = 20, 40
    pooled = []
    for i, j in cartesian([0, 10, 20, 30], [0, 16, 33, 50]):
        pooled.append(torch.linalg.svdvals(X[i : i + rows, j : j + cols]) ** 2)
    logs = torch.cat(pooled).sort().values.log()
    i = len(logs) // 2
    k = len(logs) - i
    want = 1 + k / (logs[i:].sum() - k * logs[i])
    got = monitor.farms_alpha(X, rows=20, ratio=2.0, windows=4)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(monitor.farms_alpha(X * 8, 20, 2.0, 4), got, rtol=1e-10, atol=0)
    assert monitor.farms_alpha(torch.randn(3, 1)).isnan()


def test_matrix_nuclear_norm_is_the_published_loop() -> None:
    for shape in ((100, 40), (10, 40)):
        R = matrix("gaussian", *shape)
        Z = R - R.mean(0)
        Z = torch.stack([z / z.norm() for z in Z])
        lengths = sorted((Z[:, j].norm().item() for j in range(shape[1])), reverse=True)
        want = sum(lengths[: min(shape)])
        assert abs(monitor.matrix_nuclear_norm(R) - want) < 1e-10 * want
    assert monitor.matrix_nuclear_norm(torch.ones(4, 6)) == 0


def test_zero_nonfinite_and_bad_arguments() -> None:
    X = torch.randn(3, 5, 8)
    X[1] = 0
    X[2, 0, 0] = math.nan
    for name in oracle(X[0]):
        got = getattr(monitor, name)(X)
        assert got[0] > 0 and got[1] == 0 and got[2].isnan(), name
    for name in oracle(X[0]):
        with pytest.raises(ValueError, match=rf"{name}.*at least 2 dimensions"):
            getattr(monitor, name)(torch.ones(3))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        monitor.spectral_concentration(X, 0)


def test_spectral_alignment() -> None:
    W, X = matrix("power law", 10, 16), matrix("gaussian", 200, 16)
    v = torch.linalg.svd(W).Vh[0]
    found = monitor.spectral_alignment(W, X.view(4, 50, 16))
    want = torch.nn.functional.cosine_similarity(X, v[None])
    want = want if want[0] * found.cosines[0, 0] > 0 else -want
    torch.testing.assert_close(found.cosines.flatten(), want, rtol=1e-8, atol=1e-10)
    share = (want > 0).double().mean()
    assert found.diversity == 2 * min(share, 1 - share)
    assert monitor.spectral_alignment(W, X + 100 * v).diversity == 0
    torch.testing.assert_close(
        monitor.spectral_alignment(W, v * 3).mean, torch.tensor(1.0).double()
    )
    assert monitor.spectral_alignment(W, torch.zeros(5, 16)).mean == 0
    with pytest.raises(ValueError, match="spectral_alignment: W must be"):
        monitor.spectral_alignment(W, X[:, :9])


def test_alarm_needs_health_first_and_patience() -> None:
    alarm = monitor.AlignmentAlarm(threshold=0.1, healthy=0.3, patience=2)
    assert [alarm("relu", x) for x in (0.0, 0.0, 0.0)] == [False] * 3
    told = [alarm("a", x) for x in (0.9, 0.05, 0.5, 0.1, 0.0, 0.0, 0.9, math.nan, math.nan)]
    assert [i for i, x in enumerate(told) if x] == [4, 8]


def test_growth_alarm() -> None:
    """Steady, falling and noisy values raise none; four times the calm level does, twice in a row,
    and then the layer starts anew."""
    alarm = monitor.GrowthAlarm(factor=4.0, window=3, patience=2)
    calm = [5.0, 3.0, 1.0, 1.2, 0.8, 1.1, 3.0, 5.0, 1.0]
    assert not any(alarm("a", x) for x in calm)
    told = [alarm("a", 1.3**k) for k in range(12)]
    assert [i for i, x in enumerate(told) if x] == [7]  # 1.3^5.3 is 4
    assert not any(alarm("b", 10.0**k) for k in range(3))  # its own history, still filling
    assert [alarm("a", x) for x in (math.nan, math.inf)] == [False, True]
    assert [alarm("c", x) for x in (math.inf, math.nan)] == [False, True]  # without a median yet
    with pytest.raises(ValueError, match=r"factor must be in \[1, "):
        monitor.GrowthAlarm(0.5)


def test_match_widths() -> None:
    weights = {}
    for d in (32, 64, 128):
        Q = torch.linalg.qr(matrix("gaussian", d, d)).Q
        weights[d] = {"same": Q * 3, "grows": Q * d**0.75, "bias": torch.ones(d)}
    found = monitor.match_widths(weights)
    assert set(found) == {"same", "grows"}
    assert abs(found["same"].spread - 1) < 1e-9 and abs(found["same"].exponent) < 1e-9
    assert abs(found["grows"].exponent - 0.75) < 1e-9
    with pytest.raises(ValueError, match="two or more widths"):
        monitor.match_widths({32: {}})


def test_kv_bits_is_the_best_of_all_allocations() -> None:
    norms = torch.tensor([[9.0, 1.0], [4.0, 2.5]])
    for mean in (2.0, 2.5, 3.0, 4.0):
        bits = monitor.kv_bits(norms, mean, low=1, high=4)
        error = lambda b: (norms.flatten() ** 2 * 4.0 ** -b.flatten()).sum()  # noqa: E731
        every = torch.tensor(list(cartesian(range(1, 5), repeat=4)))
        allowed = [error(b) for b in every if b.sum() <= 4 * mean]
        assert bits.shape == (2, 2) and bits.sum() <= 4 * mean
        torch.testing.assert_close(error(bits), torch.stack(allowed).min())
    with pytest.raises(ValueError, match="kv_bits: mean_bits must be in"):
        monitor.kv_bits(norms, 9.0)


def test_cache_norms() -> None:
    K = matrix("gaussian", 40, 8, batch=(2, 3))
    top, size = monitor.cache_norms(K)
    torch.testing.assert_close(top, torch.linalg.matrix_norm(K, 2), rtol=1e-12, atol=0)
    torch.testing.assert_close(size, torch.linalg.matrix_norm(K), rtol=1e-12, atol=0)
