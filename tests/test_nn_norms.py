"""Convolutions as operators, Gram bounds, rescaling, and sigmaReparam, against the SVD of the
matrices that the layers are."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_layers import EACH_CONV, dense, made, randn
from orthonorm import gram_iteration
from orthonorm import nn as on
from orthonorm import spectral_norm as sigma_1
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
# Random cases of each bound; ORTHONORM_EXAMPLES=10000 for more.
CASES = int(os.environ.get("ORTHONORM_EXAMPLES", "300"))


# ---- convolutions as operators -------------------------------------------------------------------
@EACH_CONV
def test_operator_is_the_layer(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    """A x = conv(x), <y, A x> = <A^T y, x>, and |A|_F where it is defined."""
    conv = made(make)
    A, M, W = on.ConvOperator(conv, size), dense(conv, size), conv.weight
    x, y = randn(*A.domain), randn(*A.range, seed=1)
    torch.testing.assert_close(A(W, x).flatten(), M @ x.flatten())
    torch.testing.assert_close(A.adjoint(W, y).flatten(), M.T @ y.flatten())
    torch.testing.assert_close(A.form(W, y, x), y.flatten() @ M @ x.flatten())
    if conv.padding_mode in ("zeros", "circular"):
        torch.testing.assert_close(A.square_norm(W), M.square().sum())
    else:
        with pytest.raises(ValueError, match="needs zero padding"):
            A.square_norm(W)


@pytest.mark.parametrize("steps", [0, -1])
def test_conv_spectral_norm_takes_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=r"^conv_spectral_norm: steps must be at least 1"):
        on.conv_spectral_norm(nn.Conv1d(2, 3, 3), (6,), steps)


@EACH_CONV
def test_conv_spectral_norm(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    """The SVD's norm and gradient of the matrix that the layer is."""
    conv = made(make)
    s = torch.linalg.svdvals(dense(conv, size))
    sigma = on.conv_spectral_norm(conv, size, 400)
    assert abs(sigma - s[0]) <= 1e-6 * s[0]
    (gradient,) = torch.autograd.grad(sigma, conv.weight)
    h, direction = 1e-5, randn(*conv.weight.shape, seed=2)
    values = []
    for step in (h, -h):
        with torch.no_grad():
            conv.weight.add_(direction, alpha=step)
            values.append(torch.linalg.matrix_norm(dense(conv, size), 2))
            conv.weight.sub_(direction, alpha=step)
    slope = (values[0] - values[1]) / (2 * h)
    assert abs((gradient * direction).sum() - slope) <= 1e-3 * gradient.norm() * direction.norm()


@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_exact_operator_mode(order: str) -> None:
    """The layer itself gets norm 1, and state dicts hold feature maps."""
    conv = made(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1))
    m = on.spectral_norm(conv, size=(6, 7), order=order)
    for _ in range(300):
        m.weight  # noqa: B018
    assert abs(torch.linalg.matrix_norm(dense(m.eval(), (6, 7)), 2) - 1) <= 1e-6
    m.train()
    y = m(randn(2, 2, 6, 7)) - m(randn(2, 2, 6, 7, seed=1))
    y.square().sum().backward()
    p = m.parametrizations.weight[0].eval()
    W = m.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(p, (W,))
    again = on.spectral_norm(
        made(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1)), size=(6, 7), order=order
    )
    again.load_state_dict(m.state_dict())
    assert torch.equal(again.parametrizations.weight[0]._v, p._v)
    on.remove_spectral_norm(m)
    assert abs(torch.linalg.matrix_norm(dense(m, (6, 7)), 2) - 1) <= 1e-6


def test_operator_keeps_vectors_from_bad_weights() -> None:
    m = on.spectral_norm(nn.Conv1d(2, 3, 3), size=(8,))
    with torch.no_grad():
        m.parametrizations.weight.original.zero_()
    assert not m.weight.any()
    before = [x.clone() for x in m.buffers()]
    with torch.no_grad():
        m.parametrizations.weight.original[0, 0, 0] = math.inf
    assert not m.weight.isfinite().all()
    assert all(torch.equal(x, y) for x, y in zip(before, m.buffers(), strict=True))


def test_operator_refuses() -> None:
    conv = nn.Conv2d(2, 3, 3)
    for kind, message, args in (
        (TypeError, "got Linear", (nn.Linear(2, 3), (4,))),
        (ValueError, "2 dimensions", (conv, (4,))),
        (ValueError, "must leave an output", (conv, (2, 9))),
        (ValueError, "size must be at least 1", (conv, (0, 9))),
    ):
        with pytest.raises(kind, match=message):
            on.ConvOperator(*args)
    conv.padding_mode = "mirror"
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        on.ConvOperator(conv, (8, 8))


# ---- bounds --------------------------------------------------------------------------------------
def random_case(k: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A random convolution and size."""
    g = torch.Generator().manual_seed(k)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    groups, taps = pick(1, 2), (pick(1, 3), pick(1, 3))
    channels = groups * pick(1, 3), groups * pick(1, 3)
    kind: Any = nn.Conv2d if pick(0, 2) else nn.ConvTranspose2d
    conv = kind(*channels, taps, stride=pick(1, 2), padding=pick(0, min(taps) - 1), groups=groups)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=g) * 10.0 ** pick(-3, 3))
        if not pick(0, 3):
            conv.weight[..., 0, 0] = 0
    return conv, (pick(3, 6), pick(3, 6))


def random_matrix(k: int) -> Tensor:
    """Gaussian, of low rank, with orthonormal rows or columns, or with rows of all magnitudes."""
    g = torch.Generator().manual_seed(k)
    m, n = (int(torch.randint(1, 30, (1,), generator=g)) for _ in range(2))
    W = torch.randn(m, n, generator=g)
    kind = k % 5
    if kind == 1:
        W = torch.randn(m, 1 + k % 3, generator=g) @ torch.randn(1 + k % 3, n, generator=g)
    elif kind == 2:
        W = torch.linalg.qr(W)[0]
    elif kind == 3:
        W = torch.eye(m, n) * 10 ** (8 * torch.rand(m, 1, generator=g) - 4)
    elif kind == 4:
        W = W * 10 ** (8 * torch.rand(m, 1, generator=g) - 4)
    return W * 10.0 ** (k % 7 - 3)


def test_bounds_hold() -> None:
    """Never below the true norm, in float32 against the SVD in float64."""
    for k in range(CASES):
        W = random_matrix(k)
        true = torch.linalg.matrix_norm(W.double(), 2)
        assert all(gram_iteration(W, steps) >= true for steps in (1, 3, 6)), k
        t = on.gram_rescaling(W, k % 4 + 1)
        assert ((t > 0) | (W == 0).all(-1, keepdim=True)).all(), k
        assert torch.linalg.matrix_norm(torch.where(t > 0, W.double() / t, 0.0), 2) <= 1, k
        if k % 3:
            continue
        conv, size = random_case(k)
        true = torch.linalg.matrix_norm(dense(conv.double(), size), 2)
        K = conv.weight.float()
        assert on.conv_zero_bound(K, k % 4 + 1, conv.groups).double() >= true, k
        t = on.conv_rescaling(K, k % 3 + 1, conv.groups)
        with torch.no_grad():
            conv.weight.copy_(torch.where(t > 0, K.double() / t, 0.0))
        assert torch.linalg.matrix_norm(dense(conv, size), 2) <= 1, k


def test_bounds_converge() -> None:
    """Circular to the norm itself; zero padding to the norm of large maps."""
    for groups in (1, 2):
        conv = made(
            lambda g=groups: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=g)
        )
        true = torch.linalg.matrix_norm(dense(conv, (6, 5)), 2)
        bounds = [on.conv_circular_bound(conv.weight, (6, 5), k, groups) for k in range(9)]
        assert all(a >= b * (1 - 1e-14) for a, b in itertools.pairwise(bounds))
        assert true <= bounds[8] <= true * (1 + 1e-2)
    K = made(lambda: nn.Conv1d(2, 3, 3)).weight
    limit = torch.linalg.matrix_norm(torch.fft.fft(K, 4096).movedim(-1, 0), 2).max()
    bounds = [on.conv_zero_bound(K, k) for k in range(1, 8)]
    assert all(limit <= b for b in bounds) and bounds[-1] <= limit * 1.03
    for k, close in ((1, 0.3), (8, 0.93)):
        W = randn(20, 30)
        assert close <= torch.linalg.matrix_norm(W / on.gram_rescaling(W, k), 2) <= 1


def test_one_step_of_rescaling_is_aol() -> None:
    W = randn(7, 9)
    want = (W @ W.T).abs().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(on.gram_rescaling(W, 1), want)
    K = W.view(7, 9, 1, 1)
    torch.testing.assert_close(on.conv_rescaling(K, 3).flatten(), on.gram_rescaling(W, 3).flatten())
    torch.testing.assert_close(on.conv_zero_bound(K, 3), on.gram_rescaling(W, 3).max())


def test_gradients_of_bounds() -> None:
    K, W = randn(3, 2, 3, seed=1).requires_grad_(), randn(3, 5).requires_grad_()
    for f in (
        lambda K: on.conv_circular_bound(K, (7,), 3),
        lambda K: on.conv_zero_bound(K, 2),
        lambda K: on.conv_rescaling(K, 2),
    ):
        assert torch.autograd.gradcheck(f, (K,))
    assert torch.autograd.gradcheck(lambda W: on.gram_rescaling(W, 3), (W,))
    for f in (on.conv_zero_bound, on.conv_rescaling):
        (g,) = torch.autograd.grad(f(torch.zeros_like(K, requires_grad=True) * K).sum(), K)
        assert not g.any()


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(9, 7), lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1),
     lambda: nn.ConvTranspose1d(3, 2, 3, stride=2)],
)  # fmt: skip
def test_spectral_rescale(make: Callable[[], nn.Module]) -> None:
    m = on.spectral_rescale(made(make), steps=3)
    if isinstance(m, nn.Linear):
        matrix = m.weight
    else:
        matrix = dense(m, (5,) * (m.weight.dim() - 2))
    assert 0.5 <= torch.linalg.matrix_norm(matrix, 2) <= 1
    p, W = m.parametrizations.weight[0], m.parametrizations.weight.original
    assert torch.autograd.gradcheck(p, (W.detach().clone().requires_grad_(),))
    nn.utils.parametrize.remove_parametrizations(m, "weight")


def test_layer_bound_and_penalty() -> None:
    layers = [made(lambda: nn.Linear(9, 7)), made(lambda: nn.Conv2d(2, 3, 3, padding=1))]
    bounds = [on.layer_bound(m) for m in layers]
    assert bounds[0] >= torch.linalg.matrix_norm(layers[0].weight, 2)
    assert bounds[1] >= torch.linalg.matrix_norm(dense(layers[1], (6, 6)), 2)
    for power in (1.0, 2.0):
        want = sum((b - 0.5).clamp(min=0) ** power for b in bounds)
        torch.testing.assert_close(on.norm_penalty(layers, threshold=0.5, power=power), want)
    penalty = on.norm_penalty(layers[:1], lambda m: sigma_1(m.weight, 300), power=2.0)
    (g,) = torch.autograd.grad(penalty, layers[0].weight)
    U, s, Vh = torch.linalg.svd(layers[0].weight.detach())
    torch.testing.assert_close(g, 2 * s[0] * torch.outer(U[:, 0], Vh[0]), rtol=1e-5, atol=1e-6)
    for f, message in (
        (lambda: on.layer_bound(nn.ReLU()), "got ReLU"),
        (lambda: on.layer_bound(nn.Conv2d(1, 1, 3, padding_mode="reflect")), "padding_mode"),
        (lambda: on.norm_penalty([]), "must not be empty"),
        (lambda: on.conv_circular_bound(randn(2, 2, 3), (2,)), "size must be at least 3"),
        (lambda: on.conv_zero_bound(randn(2, 2, 3), groups=3), "groups must divide"),
        (lambda: on.conv_zero_bound(randn(2, 2)), "at least 3 dimensions"),
        (lambda: on.spectral_rescale(nn.ReLU()), "got ReLU"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            f()


# ---- sigmaReparam --------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", ["sigma", "one"])
def test_sigma_reparam(gamma: str) -> None:
    """Starts as W or W / sigma_1; gradients by formula; folds."""
    layer = made(lambda: nn.Conv2d(3, 4, 3))
    W = layer.weight.detach().clone()
    m = on.sigma_reparam(layer, gamma=gamma)
    p = m.parametrizations.weight[0]
    sigma = torch.linalg.matrix_norm(W.flatten(1), 2)
    start = sigma if gamma == "sigma" else 1.0
    torch.testing.assert_close(m.weight, W / sigma * start)
    m.eval()
    G = randn(*W.shape, seed=5)
    original = m.parametrizations.weight.original
    got = torch.autograd.grad(m.weight, (original, p.gamma), G)
    u, v = p._u, p._v
    inner = (G * W).sum()
    rank_one = torch.outer(u, v).view_as(W)
    torch.testing.assert_close(got[0], p.gamma / sigma * (G - inner / sigma * rank_one))
    torch.testing.assert_close(got[1], (inner / sigma).view(1))
    want = m.weight.detach()
    on.remove_spectral_norm(m)
    torch.testing.assert_close(m.weight, want)


def test_sigma_reparam_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = randn(3, 5)
    want = model(x)
    on.sigma_reparam_(model)
    torch.testing.assert_close(model(x), want)
    names = [n for n, _ in model.named_parameters() if "gamma" in n]
    assert len(names) == 2
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="gamma must be one of"):
        on.sigma_reparam(nn.Linear(2, 2), gamma="two")
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        on.sigma_reparam(nn.LayerNorm(3))
