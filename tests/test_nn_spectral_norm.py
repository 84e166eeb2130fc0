"""Spectral normalization of layers against torch's two versions, the SVD and calculus."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from orthonorm import nn as on
from spectral_layers import (
    EACH_LAYER,
    LAYERS,
    ORDERS,
    found,
    inputs,
    net,
    original,
    pair,
    theirs,
    twins,
    weight_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations


# ---- the same results as torch -------------------------------------------------------------------
@EACH_LAYER
@ORDERS
@pytest.mark.parametrize("steps", [1, 3])
def test_same_as_torch(make: Callable[[], nn.Module], order: str, steps: int) -> None:
    """Weights, vectors and gradients over training and evaluation, in float64."""
    a, b = pair(make, order, n_power_iterations=steps)
    for k in range(4):
        for m in (a, b):
            m.train(k != 2)
        want, got = weight_of(a), weight_of(b)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        G = torch.randn(want.shape, dtype=torch.float64)
        (g,) = torch.autograd.grad(got, original(b), G)
        (h,) = torch.autograd.grad(want, original(a), G)
        torch.testing.assert_close(g, h, rtol=1e-11, atol=1e-12)
    mine, other = b.state_dict(), a.state_dict()
    assert set(mine) == set(other)
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-13)


def test_sigma_in_float32_is_torchs_to_1e_6() -> None:
    for n in (32, 100, 300):
        a, b = (wrap(nn.Linear(n, n)) for wrap in (theirs("u_first"), on.spectral_norm))
        b.load_state_dict(a.state_dict())
        for _ in range(3):
            ratio = (b.weight / a.weight).nanmedian()
            assert abs(ratio - 1) <= 1e-6


@ORDERS
def test_converges_to_the_spectral_norm(order: str) -> None:
    torch.manual_seed(0)
    m = on.spectral_norm(nn.Conv2d(5, 7, 3).double(), order=order)
    for _ in range(500):
        weight = m.weight
    assert abs(torch.linalg.matrix_norm(weight.flatten(1), 2) - 1) <= 1e-10


def test_vectors_are_divided_by_their_norm() -> None:
    m = on.spectral_norm(nn.BatchNorm1d(7).double())
    n = parametrizations.spectral_norm(nn.BatchNorm1d(7).double())
    assert torch.equal(m.weight, n.weight)
    assert on.refresh_vectors_(m) is m


# ---- state dicts ---------------------------------------------------------------------------------
@ORDERS
@pytest.mark.parametrize("own", ["u_first", "v_first"])
def test_state_dicts_of_both_versions_load(order: str, own: str) -> None:
    """Torch's into ours, whatever its names; ours into torch's of the same order."""
    a, _ = pair(LAYERS["ConvTranspose2d"], order)
    weight_of(a)
    b = on.spectral_norm(LAYERS["ConvTranspose2d"]().double(), order=own)
    b.load_state_dict(a.state_dict())
    a.eval(), b.eval()
    torch.testing.assert_close(b.weight, weight_of(a), rtol=1e-12, atol=0)
    c = theirs(own)(LAYERS["ConvTranspose2d"]().double())
    c.load_state_dict(b.state_dict())
    c.eval()
    torch.testing.assert_close(b.weight, weight_of(c), rtol=1e-12, atol=0)


def test_oldest_state_dicts_load() -> None:
    """Of the hook before it kept v: weight, weight_orig and weight_u."""
    a, b = pair(LAYERS["Linear"], "v_first")
    for _ in range(3):
        weight_of(a)
    state = a.state_dict()
    old = {k: v for k, v in state.items() if k != "weight_v"}
    old["weight"] = a.weight.detach().clone()
    b.load_state_dict(old)
    b.eval()
    torch.testing.assert_close(b.weight, a.weight, rtol=1e-10, atol=0)


# ---- all layers of a model at once
@ORDERS
def test_together_is_one_by_one(order: str) -> None:
    """Outputs, buffers and gradients, with two forwards before one backward."""
    a, b = twins(order)
    for step in range(3):
        for m in (a, b):
            m.zero_grad()
            m.train(step != 1)
            (m(inputs()) - m(inputs(4)).square()).sum().backward()
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-13, msg=name)


def test_one_call_of_the_op_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthonorm.nn import normalized

    _, b = twins()
    calls = []
    op = normalized.spectral_normalization_
    real = op.overload
    monkeypatch.setattr(op, "overload", lambda W, *a: calls.append(len(W)) or real(W, *a))
    b(inputs())
    assert calls == [4]
    b[0](inputs())  # a layer without its model
    assert calls == [4, 1]
    b[6].eval()
    b(inputs())
    assert sorted(calls[2:]) == [1, 3]


def test_unused_layers_get_no_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    m = on.spectral_norm_(Half())
    m(torch.randn(2, 4)).sum().backward()
    assert original(m.used).grad is not None and original(m.idle).grad is None


def test_a_failed_forward_leaves_nothing_behind() -> None:
    _, b = twins()
    with pytest.raises(RuntimeError):
        b(torch.zeros(2, 5, 8, 8, dtype=torch.float64))
    before = b.state_dict()[next(k for k in b.state_dict() if k.endswith("_u"))].clone()
    weight = b[0].weight  # computed anew, with a step of its own
    assert weight.requires_grad and not any(p.ready.results.running for _, _, _, p in found(b))
    assert not torch.equal(before, found(b)[0][3]._u)


def test_chosen_layers() -> None:
    m = net()
    on.spectral_norm_(m, layers=[m[0], m[6]])
    assert [path for path, *_ in found(m)] == ["0", "6"]
    with pytest.raises(ValueError, match="in the model"):
        on.spectral_norm_(net(), layers=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="no layers"):
        on.spectral_norm_(nn.Sequential(nn.ReLU()))


def test_gradients_are_those_of_autograd() -> None:
    """First and second, of W / (u^T W v) with u and v constant."""
    m = on.spectral_norm(nn.ConvTranspose1d(3, 4, 2).double()).eval()
    p, W = found(m)[0][3], original(m).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(p, (W,))
    assert torch.autograd.gradgradcheck(p, (W,))


def test_gradient_penalty_trains() -> None:
    """A double backward through the layers, as WGAN-GP takes it, equals torch's."""
    grads = []
    a, b = pair(LAYERS["Linear"], "u_first")
    for m in (a, b):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(2, 20).requires_grad_()
        (g,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        (g.norm() - 1).square().backward()
        grads.append(original(m).grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_keep_float_vectors(dtype: torch.dtype) -> None:
    """As FSDP's mixed precision has it: off by at most twice the rounding of the result."""
    torch.manual_seed(0)
    m = on.spectral_norm(nn.Linear(40, 30, bias=False).to(dtype))
    W = original(m).detach()
    p = found(m)[0][3]
    assert p._u.dtype == torch.float32
    got = m.weight
    want = W.double() / (p._u.double() @ W.double() @ p._v.double())
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 2 * (want.to(dtype).double() - want).norm()
    G = torch.randn(30, 40).to(dtype)
    (g,) = torch.autograd.grad(got, original(m), G)
    assert g.dtype == dtype and g.isfinite().all()
    cast = on.spectral_norm_(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))).to(dtype)
    cast(torch.randn(3, 40).to(dtype)).sum().backward()  # its vectors are halves too
    assert all(p.grad.isfinite().all() for p in cast.parameters())
