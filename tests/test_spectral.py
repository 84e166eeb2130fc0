"""Public K3 functions against the SVD in float64, integer matrices of known norm, and calculus.

Bounds are theorems, not choices: a Rayleigh quotient never exceeds sigma_1, and k steps from v_0 at
angle theta to v_1 leave sigma >= sigma_1 sqrt(1 - tan^2(theta) (sigma_2 / sigma_1)^(4k - 2)). What
rounding may add is 2 err(same-dtype torch), or units of eps of a sum of n products.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from orthonorm import LOADED, gram_iteration, power_iteration, spectral_norm
from orthonorm.ops.spectral import start_vector
from polar_judge import DTYPES, matrix
from torch import Tensor

KERNELS = ("gram", "CPU") in LOADED.served
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
ORDERS = pytest.mark.parametrize("order", ["u_first", "v_first"])
SHAPES = ((1, 1), (1, 9), (9, 1), (30, 50), (50, 30), (40, 40), (130, 300), (300, 7))
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "power_iteration": lambda W: power_iteration(W, steps=4)[0],
    "spectral_norm": spectral_norm,
    "gram_iteration": gram_iteration,
}
EACH_VALUE = pytest.mark.parametrize("f", VALUES.values(), ids=VALUES)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def outer(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results."""
    return torch.promote_types(dtype, torch.float32)


def wide(dtype: torch.dtype) -> bool:
    """Where the oracle is as inexact as we are: torch's error is then that in float32 * 2^-29."""
    return dtype == torch.float64


def of_products(W: Tensor) -> float:
    """What |W v| may be off by, relative to sigma_1: n eps |W|_F."""
    rank = min(W.shape[-2:])
    return max(W.shape[-2:]) * math.sqrt(rank) * torch.finfo(outer(W.dtype)).eps


# ---- power iteration -----------------------------------------------------------------------------
@ORDERS
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_iteration_converges_from_below(
    shape: tuple[int, int], dtype: torch.dtype, order: str
) -> None:
    """Between sigma_1 and the classical bound; u and v of length one; sigma = u^T W v."""
    W = matrix("log 1e-2", *shape).to(dtype)
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    second = s[1] / s[0] if len(s) > 1 else torch.tensor(0.0)
    from_v = order == "u_first"
    start = start_vector(W.double() if from_v else W.double().mT)
    cosine = ((Vh[0] if from_v else U[:, 0]) @ start).abs().clamp(max=1.0)
    slope = (1 / cosine.square() - 1).item()  # tan^2
    for steps in (1, 2, 5, 30):
        sigma, u, v = power_iteration(W, steps=steps, order=order)
        assert sigma.dtype == u.dtype == v.dtype == outer(dtype)
        missing = min(1.0, slope * second.item() ** (4 * steps - 2))
        error = of_products(W)
        assert math.sqrt(1 - missing) - error <= sigma / s[0] <= 1 + error
        lengths = torch.stack([u.double().norm(), v.double().norm()])
        assert (lengths - 1).abs().max() <= 2 * torch.finfo(outer(dtype)).eps
        assert abs(sigma - u.double() @ W.double() @ v.double()) <= error * s[0]
    assert torch.equal(power_iteration(W, steps=30, order=order)[0], sigma)


def plain_power(W: Tensor, steps: int, order: str) -> tuple[Tensor, Tensor]:
    u, v = start_vector(W.mT), start_vector(W)
    for _ in range(steps):
        if order == "u_first":
            u = torch.nn.functional.normalize(W @ v, dim=0)
        v = torch.nn.functional.normalize(W.mT @ u, dim=0)
        if order == "v_first":
            u = torch.nn.functional.normalize(W @ v, dim=0)
    return u, v


@ORDERS
def test_warm_buffers_continue_where_they_were(order: str) -> None:
    """Five steps are five times one step; zero steps change nothing; inputs are not written."""
    for shape in ((20, 30), (30, 20), (7, 7)):
        W = randn(*shape, dtype=torch.float32)
        sigma, u, v = power_iteration(W, steps=5, order=order)
        again, *warm = power_iteration(W, order=order)
        for _ in range(4):
            before = [x.clone() for x in warm]
            given, (again, *warm) = warm, power_iteration(W, *warm, order=order)
            assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        exact, plain = plain_power(W.double(), 5, order), plain_power(W, 5, order)
        allowed = [2 * (a - b).norm() + 4 * 2.0**-23 for a, b in zip(plain, exact, strict=True)]
        for vectors in ((u, v), warm):
            for x, right, most in zip(vectors, exact, allowed, strict=True):
                assert (x - right).norm() <= most
        assert abs(sigma - again) <= of_products(W) * sigma
        only, *vectors = power_iteration(W, u, v, steps=0, order=order)
        assert torch.equal(vectors[0], u) and torch.equal(vectors[1], v)
        assert abs(only - u.double() @ W.double() @ v.double()) <= of_products(W) * sigma


@pytest.mark.parametrize("n_steps", [1, 3])
def test_orders_are_those_of_torch(n_steps: int) -> None:
    """u_first: the parametrization's, from its v; v_first: the legacy hook's, from its u."""
    W = randn(12, 20)
    new = torch.nn.utils.parametrizations.spectral_norm(
        torch.nn.Linear(20, 12, bias=False).double(), n_power_iterations=n_steps
    )
    state = new.parametrizations.weight[0]
    new.parametrizations.weight.original.data = W.clone()
    _, u, v = power_iteration(W, state._u.clone(), state._v.clone(), n_steps, eps=1e-12)
    theirs = new.weight  # updates the buffers
    torch.testing.assert_close((u, v), (state._u, state._v), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(W / (u @ W @ v), theirs.detach(), rtol=1e-12, atol=1e-13)

    old = torch.nn.Linear(20, 12, bias=False).double()
    old.weight.data = W.clone()
    old = torch.nn.utils.spectral_norm(old, n_power_iterations=n_steps)
    sigma, u, v = power_iteration(W, old.weight_u.clone(), None, n_steps, "v_first", 1e-12)
    old(torch.zeros(1, 20, dtype=torch.float64))
    torch.testing.assert_close((u, v), (old.weight_u, old.weight_v), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(W / sigma, old.weight.detach(), rtol=1e-12, atol=1e-13)


def test_eps_clamps_the_norms() -> None:
    """u = W v / max(|W v|, eps)."""
    W, eps = randn(6, 9) * 1e-9, 1e-6
    v0 = start_vector(W)
    sigma, u, v = power_iteration(W, eps=eps)
    torch.testing.assert_close(u, W @ v0 / eps, rtol=1e-13, atol=0)
    torch.testing.assert_close(v, W.T @ u / eps, rtol=1e-13, atol=0)
    torch.testing.assert_close(sigma, u @ W @ v, rtol=1e-13, atol=0)


# ---- bounds and values of all three --------------------------------------------------------------
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectral_norm_of_a_gap(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """sigma_2 / sigma_1 = 1/2: after 32 steps only rounding is left, 4 ulp and twice torch's."""
    W = matrix("power law", *shape).to(dtype)
    true = torch.linalg.matrix_norm(W.double(), 2)
    sigma = spectral_norm(W)
    assert sigma.dtype == outer(dtype)
    plain = abs(torch.linalg.matrix_norm(W.float(), 2) - true) * (2.0**-29 if wide(dtype) else 1)
    assert abs(sigma - true) <= 2 * plain + 4 * torch.finfo(outer(dtype)).eps * true


@EACH_DTYPE
@pytest.mark.parametrize("kind", ["gaussian", "flat", "log 1e-5", "two spikes", "rank n/2"])
def test_gram_iteration_is_certified(kind: str, dtype: torch.dtype) -> None:
    """sigma_1 <= Schatten norm of order 2^(k+1) <= bound, which is no larger than it promises."""
    for shape in SHAPES:
        W = matrix(kind, *shape).to(dtype)
        s = torch.linalg.svdvals(W.double())
        eps = torch.finfo(outer(dtype)).eps
        noise = max(shape) * torch.finfo(torch.float64).eps  # of the SVD; W itself is exact
        last = math.inf
        for steps in range(9):
            bound = gram_iteration(W, steps)
            assert bound.dtype == outer(dtype)
            powers = (s / s[0]).nan_to_num() ** 2 ** (steps + 1)
            schatten = s[0] * powers.sum() ** 0.5 ** (steps + 1)
            assert bound >= s[0] * (1 - (noise if wide(dtype) else 0.0)), (shape, steps)
            slack = 1 + 4 * max(shape) * eps  # 2 promised, 2 for what it covers
            assert schatten * (1 - noise) <= bound <= schatten * (slack + noise), (shape, steps)
            assert bound <= last * (1 + 2 * max(shape) * eps)  # falls with k, but for rounding
            last = bound.item()


@EACH_DTYPE
@EACH_VALUE
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (16, 4), (4, 36), (128, 512)], ids=str)
def test_norms_known_exactly(
    f: Callable[[Tensor], Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """All ones (norm sqrt(m n)) and Hadamard matrices (sqrt(n)), where no SVD need be trusted."""
    m, n = shape
    hadamard = torch.ones(1, 1)
    while len(hadamard) < m:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    for W, exact in ((torch.ones(shape), math.sqrt(m * n)), (hadamard, math.sqrt(m))):
        for sign in (1, -1):
            X = (sign * W).to(dtype)
            eps = torch.finfo(outer(dtype)).eps
            if f is VALUES["gram_iteration"]:
                for steps in range(9):
                    rank = 1 if exact**2 == m * n else m
                    most = exact * rank**0.5 ** (steps + 1) * (1 + 4 * max(X.shape) * eps)
                    assert exact <= gram_iteration(X, steps).item() <= most
            else:
                assert abs(f(X).item() - exact) <= of_products(X) * exact


# ---- the same alone, in a batch, in a list, and in any layout ------------------------------------
def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit where kernels serve; torch's batched products round apart from its single ones"""
    return torch.equal(a, b) if KERNELS else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@EACH_DTYPE
def test_batch_and_list_are_loops(dtype: torch.dtype) -> None:
    W = randn(2, 3, 17, 33, dtype=dtype)
    for f in VALUES.values():
        batch = f(W)
        assert batch.shape == (2, 3)
        for i in range(2):
            assert all(same(f(W[i, j]), batch[i, j]) for j in range(3))
    sigma, u, v = power_iteration(W, steps=3)
    assert u.shape == (2, 3, 17) and v.shape == (2, 3, 33)
    mixed = [W[0, 1], W[:, 2], randn(5, 4, dtype=dtype)]
    sigmas, us, vs = power_iteration(mixed, steps=3)
    assert sigmas.shape == (4,)
    assert same(sigmas[:3], torch.stack([sigma[0, 1], sigma[0, 2], sigma[1, 2]]))
    assert same(us[0], u[0, 1]) and same(vs[1], v[:, 2])


@EACH_VALUE
@EACH_DTYPE
def test_layouts(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    base = randn(40, 60, dtype=dtype)
    views = {
        "transposed": base.T,
        "rows of a wider one": base[3:30, 5:41],
        "every second": base[::2, ::3],
        "expanded": base[:1].expand(7, 60),
        "batch inside": base.view(40, 6, 10).movedim(1, 0),
    }
    for name, W in views.items():
        before = base.clone()
        got, want = f(W), f(W.contiguous())
        error = of_products(W) * want.double()
        assert bool(((got.double() - want.double()).abs() <= 2 * error).all()), name
        assert torch.equal(base, before), name


def test_start_vectors() -> None:
    """Any scale and dtype; the vector found is found again in no time."""
    W = matrix("log 1e-2", 30, 50).float()
    _, _, v = power_iteration(W, steps=60)
    want = torch.linalg.matrix_norm(W.double(), 2)
    for scale, dtype in ((1.0, torch.float64), (1e-40, torch.float32), (1e36, torch.float32)):
        sigma = spectral_norm(W, 1, (v * scale).to(dtype))
        assert abs(sigma - want) <= 1e-5 * want  # 1e-40 is denormal: 17 bits of v are left
    assert spectral_norm(torch.stack([W, W * 2]), 8, torch.stack([v, v]).half()).shape == (2,)


# ---- special values ------------------------------------------------------------------------------
@EACH_VALUE
@EACH_DTYPE
def test_zero_empty_and_nonfinite(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for shape in ((5, 8), (8, 5), (1, 1), (200, 3)):
        assert f(torch.zeros(shape, dtype=dtype)).item() == 0.0
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert f(torch.zeros(shape, dtype=dtype)).item() == 0.0
    for shape in ((0, 3, 4), (2, 0, 3, 4)):
        assert f(torch.zeros(shape, dtype=dtype)).shape == shape[:-2]
    W = randn(3, 6, 9, dtype=dtype)
    clean = f(W)
    for bad in (math.nan, math.inf, -math.inf):
        W[1, 5, 8] = bad
        got = f(W)
        assert got[1].isnan()
        assert torch.equal(got[::2], clean[::2])


@EACH_VALUE
@pytest.mark.parametrize(
    ("dtype", "k"),
    [(torch.float32, -146), (torch.float32, -130), (torch.float32, 119), (torch.bfloat16, 119),
     (torch.float16, -14), (torch.float16, 12), (torch.float64, -1071), (torch.float64, -1040),
     (torch.float64, 1015)],
)  # fmt: skip
def test_scales(f: Callable[[Tensor], Tensor], dtype: torch.dtype, k: int) -> None:
    """f(2^k W) = 2^k f(W): denormals (1e-40) and squares that overflow (1e36) alike."""
    W = torch.round(randn(2, 12, 20) * 4)
    W[0, 0, 0] = 7.0
    scaled = times_power(W, k).to(dtype)
    assert torch.equal(times_power(scaled.double(), -k), W)
    want, got = f(W.to(outer(dtype))).double(), times_power(f(scaled).double(), -k)
    info = torch.finfo(outer(dtype))
    ulp = math.ldexp(info.smallest_normal * info.eps, -k) if k < -100 else 0.0  # of a denormal:
    allowed = 2 * of_products(W.to(dtype)) * want + 1.5 * ulp  # rounded, and once more upwards
    assert bool(((got - want).abs() <= allowed).all())
    if f is gram_iteration:
        assert bool((got >= torch.linalg.matrix_norm(W, 2)).all())


def times_power(x: Tensor, k: int) -> Tensor:
    return x * 2.0 ** (k // 2) * 2.0 ** (k - k // 2)


def test_largest_numbers_give_infinity_not_nan() -> None:
    W = torch.full((8, 8), 3e38)
    for f in VALUES.values():
        assert f(W).item() == math.inf
    _, u, v = power_iteration(W)
    assert u.isfinite().all() and v.isfinite().all()


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 5, 3), (1, 4)], ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    W = (matrix("power law", *shape[-2:], batch=shape[:-2])).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: spectral_norm(W, 60), (W,))
    for steps in (0, 1, 3, 6):
        assert torch.autograd.gradcheck(lambda W, k=steps: gram_iteration(W, k), (W,))


def rank_one(W: Tensor) -> Tensor:
    """u_1 v_1^T by power steps in longdouble: LAPACK's float64 vectors are 40 times worse here."""
    A = W.double().numpy().astype(np.longdouble)
    v = start_vector(W.double()).numpy().astype(np.longdouble)
    for _ in range(64):
        u = A @ v
        v = A.T @ u
        v /= np.sqrt((v * v).sum())
    u /= np.sqrt((u * u).sum())
    return torch.from_numpy((u[:, None] * v).astype(np.float64))


@EACH_DTYPE
def test_spectral_norm_gradient_is_rank_one(dtype: torch.dtype) -> None:
    W = matrix("power law", 24, 40, batch=(3,)).to(dtype).requires_grad_()
    factor = torch.tensor([1.0, -2.0, 0.5], dtype=outer(dtype))
    (gradient,) = torch.autograd.grad((factor * spectral_norm(W)).sum(), W)
    _, u, v = torch.ops.orthonorm.spectral_norm(W.detach())
    want = factor[:, None, None] * (u[..., None] * v[..., None, :])
    assert torch.equal(gradient, want.to(dtype))
    exact = factor.double()[:, None, None] * torch.stack([rank_one(w) for w in W.detach()])
    V = W.detach().float().requires_grad_()
    (theirs,) = torch.autograd.grad((factor * torch.linalg.matrix_norm(V, 2)).sum(), V)
    plain = (theirs.double() - exact).norm() * 2.0**-29
    plain = plain if wide(dtype) else (theirs.to(dtype).double() - exact).norm()
    few = 4 * torch.finfo(outer(dtype)).eps * exact.norm()
    assert (gradient.double() - exact).norm() <= 2 * plain + few


def schatten_gradient(W: Tensor, steps: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    order = 2.0 ** (steps + 1)
    size = (s / s[0]).pow(order).sum() ** (1 / order)
    return (U * (s / s[0] / size).pow(order - 1)) @ Vh


def plain_gram(W: Tensor, steps: int) -> Tensor:
    """Repeated Gram products, rescaled, for autograd."""
    M, logarithm = W, torch.zeros((), dtype=W.dtype)
    for k in range(steps + 1):
        size = M.norm()
        logarithm = logarithm + size.log() / 2**k
        M = (M / size) @ (M / size).T
    return logarithm.exp()


@EACH_DTYPE
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 8])
def test_gram_iteration_gradient(dtype: torch.dtype, steps: int) -> None:
    """That of the Schatten norm; no worse than twice autograd through the same products."""
    for shape in ((24, 40), (40, 24), (7, 1)):
        W = matrix("log 1e-2", *shape).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(gram_iteration(W, steps), W)
        assert gradient.dtype == dtype and gradient.shape == W.shape
        exact = schatten_gradient(W.detach(), steps)
        V = W.detach().to(outer(dtype)).requires_grad_()
        (theirs,) = torch.autograd.grad(plain_gram(V, steps), V)
        plain = (theirs.to(dtype).double() - exact).norm()
        promised = 2 * max(shape) * torch.finfo(outer(dtype)).eps * exact.norm()  # the slack
        assert (gradient.double() - exact).norm() <= 2 * plain + 2 * promised


@pytest.mark.parametrize("f", [spectral_norm, gram_iteration])
def test_gradients_of_special_matrices(f: Callable[[Tensor], Tensor]) -> None:
    W = randn(3, 5, 8, dtype=torch.float32)
    W[1] = 0
    W[2, 0, 0] = math.nan
    W.requires_grad_()
    (gradient,) = torch.autograd.grad(f(W).sum(), W)
    alone = W[0].detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(f(alone), alone)
    assert same(gradient[0], wanted)
    assert not gradient[1].any()
    assert gradient[2].isnan().any()
    (empty,) = torch.autograd.grad(f(w := torch.zeros(0, 4, 5, requires_grad=True)).sum(), w)
    assert empty.shape == (0, 4, 5)
    (first,) = torch.autograd.grad(f(alone), alone, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()
    assert not power_iteration(alone)[0].requires_grad
