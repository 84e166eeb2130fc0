"""Whitening, retractions, low-rank steps and the Jacobian penalty against SVD and autograd."""

from __future__ import annotations

import pytest
import torch
from orthonorm import nn as on
from polar_judge import matrix
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- whitening -----------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", ["batch", "channel"])
def test_iter_norm_converges_to_whitening(axis: str) -> None:
    """Sigma^(-1/2) X by an eigendecomposition."""
    for shape in ((6, 40), (3, 5, 30)):
        X = randn(*shape)
        Z = X if axis == "batch" else X.mT
        X = X - X.mean(-1, keepdim=True)
        values, vectors = torch.linalg.eigh(X @ X.mT / (X.shape[-1] - 1))
        want = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT @ X
        got = on.iter_norm(Z, 15, axis)
        torch.testing.assert_close(got if axis == "batch" else got.mT, want, rtol=1e-6, atol=1e-6)


def test_four_steps_leave_small_directions_small() -> None:
    """The polynomial of four steps on every eigenvalue: p <- (3 p - p^3 x) / 2."""
    for n, d in ((8, 60), (40, 6)):  # the second has 35 directions without any variance
        Z = randn(n, d)
        Z = Z - Z.mean(-1, keepdim=True)
        values, vectors = torch.linalg.eigh(Z @ Z.T / (d - 1))
        x, p = values / values.sum(), torch.ones(n, dtype=torch.float64)
        for _ in range(4):
            p = 1.5 * p - 0.5 * p**3 * x
        want = vectors @ torch.diag(p / values.sum().sqrt()) @ vectors.T @ Z
        torch.testing.assert_close(on.IterNorm()(Z), want)
        whitened = torch.linalg.eigvalsh(want @ want.T / (d - 1))[-min(n, d - 1) :]
        assert whitened.min() > 0.5 and whitened.max() <= 1


@pytest.mark.parametrize("axis", ["batch", "channel"])
def test_whitening_gradients(axis: str) -> None:
    a, b = randn(5, 6).requires_grad_(), randn(5, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda Z: on.iter_norm(Z, 4, axis), (a,))
    assert torch.autograd.gradcheck(lambda a, b: on.intl_loss([a, b], 0.3, 4, axis), (a, b))
    assert torch.autograd.gradcheck(lambda Z: on.trace_loss(Z, axis), (a,))


def test_intl_loss() -> None:
    """By its definition, on three views; the published weight; zero features."""
    views = [randn(16, 10, seed=k) for k in range(3)]
    t = [on.iter_norm(z) for z in views]
    terms = []
    for i in (1, 2):
        cosine = (t[i] * t[0]).sum(1) / (t[i].norm(dim=1) * t[0].norm(dim=1))
        trace = sum(((t[k].var(1) - 1) ** 2).sum() for k in (i, 0))
        terms.append((2 - 2 * cosine).mean() + 0.01 * (4 - 3) * trace)
    torch.testing.assert_close(on.intl_loss(views), sum(terms) / 2)
    assert not on.iter_norm(torch.zeros(4, 5)).any()
    assert torch.equal(on.trace_loss(views[0], "channel"), on.trace_loss(views[0].T, "batch"))
    for f, message in (
        (lambda: on.iter_norm(randn(4, 1)), "two entries to centre"),
        (lambda: on.iter_norm(randn(4, 3), axis="rows"), "axis must be one of"),
        (lambda: on.intl_loss(views[:1]), "two or more, got 1"),
        (lambda: on.intl_loss([views[0], views[1][:, :4]]), r"views\[1\] must have shape"),
        (lambda: on.IterNorm(0), "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            f()


# ---- orthonormal columns -------------------------------------------------------------------------
def frames(*shape: int) -> Tensor:
    return torch.linalg.qr(randn(*shape)).Q


def test_tangents() -> None:
    """Projections: idempotent, and the curve S - h T stays orthonormal to first order."""
    S, D = frames(4, 9, 3), randn(4, 9, 3, seed=1)
    for tangent in (on.grassmann_tangent, on.stiefel_tangent):
        T = tangent(S, D)
        torch.testing.assert_close(tangent(S, T), T)
        skew = S.mT @ T
        torch.testing.assert_close(skew, -skew.mT, rtol=0, atol=1e-14)
    assert (S.mT @ on.grassmann_tangent(S, D)).abs().max() <= 1e-14


@pytest.mark.parametrize("steps", [None, 2, 3])
def test_polar_retraction(steps: int | None) -> None:
    """The SVD's polar factor; orthonormal columns."""
    S = frames(50, 16, 4)
    T = on.grassmann_tangent(S, randn(50, 16, 4, seed=1))
    step = 0.3 if steps == 2 else 0.9
    T = T / torch.linalg.matrix_norm(T, 2)[:, None, None]
    U, _, Vh = torch.linalg.svd(S - step * T, full_matrices=False)
    got = on.polar_retraction(S, T, step, steps)
    off = {None: 1e-13, 2: 1e-9, 3: 2e-6}[steps]
    assert (got - U @ Vh).abs().max() <= off
    assert (got.mT @ got - torch.eye(4, dtype=torch.float64)).abs().max() <= 4 * off


def test_polar_retraction_is_the_geodesic_to_second_order() -> None:
    S = frames(9, 3)
    T = on.grassmann_tangent(S, randn(9, 3, seed=2))
    U, s, Vh = torch.linalg.svd(-T, full_matrices=False)
    gaps = []
    for step in (0.02, 0.01):
        geodesic = (
            S @ Vh.T @ torch.diag((step * s).cos()) @ Vh + U @ torch.diag((step * s).sin()) @ Vh
        )
        gaps.append((on.polar_retraction(S, T, step) - geodesic).norm())
    assert 7 <= gaps[0] / gaps[1] <= 9  # third order is left


def test_grassmann_classes() -> None:
    S, x = frames(5, 9, 2), randn(7, 9, seed=3)
    got = on.grassmann_logits(x, S, 25.0)
    want = torch.stack([25 * (x @ s).norm(dim=1) / x.norm(dim=1) for s in S], 1)
    torch.testing.assert_close(got, want)
    inputs = (x.requires_grad_(), S.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, S: on.grassmann_logits(x, S, 2.0), inputs)
    with pytest.raises(ValueError, match="no more columns than rows"):
        on.polar_retraction(S.mT, S.mT)
    with pytest.raises(ValueError, match="T must have shape"):
        on.polar_retraction(S, S[:1])


# ---- low rank ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gaussian", "log 1e-5", "rank n/2"])
def test_nuclear_norm(kind: str) -> None:
    for shape in ((20, 30), (30, 20), (16, 16)):
        X = matrix(kind, *shape)
        want = torch.linalg.svdvals(X).sum()
        assert abs(on.nuclear_norm(X) - want) <= 1e-12 * want
        assert (
            abs(on.nuclear_norm(X.bfloat16()) - torch.linalg.svdvals(X.bfloat16().double()).sum())
            <= 1e-4 * want
        )


def test_orthonormalize_lora() -> None:
    """The same product; the rows of A orthonormal and of the same span as the SVD's."""
    B, A = randn(2, 12, 4), randn(2, 4, 20, seed=1)
    new_b, new_a = on.orthonormalize_lora(B, A)
    torch.testing.assert_close(new_b @ new_a, B @ A)
    torch.testing.assert_close(new_a @ new_a.mT, torch.eye(4).double().expand(2, 4, 4))
    rows = torch.linalg.svd(B @ A, full_matrices=False).Vh[:, :4]
    torch.testing.assert_close(new_a.mT @ new_a, rows.mT @ rows)
    with pytest.raises(ValueError, match="no more rows than columns"):
        on.orthonormalize_lora(randn(3, 9), randn(9, 4))


def test_star() -> None:
    X = matrix("power law", 20, 30)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    for keep in (0.1, 0.4, 1.0):
        r = next(k for k in range(1, 21) if s[:k].sum() >= keep * s.sum() * (1 - 1e-12))
        want = (U[:, :r] * s[:r]) @ Vh[:r] * (s.sum() / s[:r].sum())
        torch.testing.assert_close(on.star(X, keep), want)
        r = min(r, 4)
        want = (U[:, :r] * s[:r]) @ Vh[:r] * (s.sum() / s[:r].sum())
        torch.testing.assert_close(on.star(X, rank=r, steps=30), want, rtol=1e-4, atol=1e-6)
    for options in ({}, {"rank": 2}):
        assert not on.star(torch.zeros(5, 4), **options).any()


# ---- the Jacobian's nuclear norm -----------------------------------------------------------------
def test_jacobian_penalty() -> None:
    """Within five standard errors of the Frobenius norms by autograd; above the nuclear norm."""
    torch.manual_seed(0)
    A, B = randn(5, 6) * 0.4, randn(3, 5, seed=1) * 0.4
    h, g = (lambda x: torch.tanh(x @ A.T)), (lambda y: torch.tanh(y @ B.T))
    x = randn(4, 6, seed=2)
    jacobian = torch.stack([torch.autograd.functional.jacobian(h, row) for row in x])
    draws = torch.stack([on.jacobian_square(h, x, 1e-3) for _ in range(2000)])
    error = draws.std(0) / 2000**0.5
    assert bool(((draws.mean(0) - jacobian.square().sum((1, 2))).abs() <= 5 * error).all())
    full = torch.stack([torch.autograd.functional.jacobian(lambda z: g(h(z)), row) for row in x])
    nuclear = torch.linalg.svdvals(full).sum(-1).mean()
    assert on.jacobian_nuclear_penalty(g, h, x, 1e-3, 2000) >= nuclear
    A.requires_grad_()
    on.jacobian_nuclear_penalty(g, h, x).backward()
    assert A.grad is not None and A.grad.isfinite().all() and A.grad.any()
    with pytest.raises(ValueError, match="sigma must be above 0"):
        on.jacobian_square(h, x, 0.0)


# ---- trained singular vectors --------------------------------------------------------------------
def test_cayley_rotation() -> None:
    """A rotation for any A, as exact as a solver's; I for symmetric A; NaN stays in its matrix."""
    for size in (1e-3, 1.0, 100.0):
        A = randn(3, 6, 6) * size
        K, identity = (A - A.mT) / 2, torch.eye(6).double()
        want = (identity - K) @ torch.linalg.inv(identity + K)
        for dtype in (torch.float32, torch.bfloat16):
            given = A.to(dtype)
            H = (given.double() - given.double().mT) / 2
            exact = (identity - H) @ torch.linalg.inv(identity + H)
            got = on.cayley_rotation(given)
            assert got.dtype == dtype
            assert (got.double() - exact).norm() <= 2 * (exact.to(dtype).double() - exact).norm()
        torch.testing.assert_close(on.cayley_rotation(A), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(on.cayley_rotation(A + A.mT), identity.expand(3, 6, 6))
    A[1, 2, 3] = torch.nan
    bad = on.cayley_rotation(A).isnan().flatten(1).any(1)
    assert bad.tolist() == [False, True, False]
    small = randn(2, 3, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(on.cayley_rotation, (small,))


def test_renormalize_columns() -> None:
    U = randn(2, 7, 4)
    U[0, :, 1] = 0
    before = U.clone()
    assert on.renormalize_columns_(U, torch.tensor([1, 3])) is U
    assert torch.equal(U[..., ::2], before[..., ::2]) and not U[0, :, 1].any()
    lengths = on.renormalize_columns_(U).norm(dim=-2)
    torch.testing.assert_close(lengths[1], torch.ones(4).double())
    W = torch.nn.Parameter(randn(5, 3))
    on.renormalize_columns_(W)
    assert W.requires_grad and W.is_leaf and W.grad_fn is None


def test_bad_singular_vectors() -> None:
    U, s, A = randn(7, 3), randn(3), randn(3, 3)
    before = U.clone()
    for kind, message, f in (
        (ValueError, "A must be square, got shape", lambda: on.cayley_rotation(U)),
        (TypeError, "float32", lambda: on.cayley_rotation(A.long())),
        (ValueError, r"s must have shape \(3,\)", lambda: on.spectral_rotation(U, s[:2], U, A, A)),
        (ValueError, r"B must have shape \(3, 3\)", lambda: on.spectral_rotation(U, s, U, A, U)),
        (TypeError, "1-D tensor of int64", lambda: on.renormalize_columns_(U, [1])),
        (ValueError, r"columns must be in \[0, 2\], got \[0, 3\]",
         lambda: on.renormalize_columns_(U, torch.tensor([0, 3]))),
        (ValueError, "at least 2 dimensions", lambda: on.renormalize_columns_(s)),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            f()
    assert torch.equal(U, before)
