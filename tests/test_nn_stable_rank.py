"""Stable rank normalization of dense layers and of convolutions, against the SVD."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conv_layers import EACH_CONV, dense, made, randn
from orthonorm import nn as on
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def stable_rank(W: Tensor) -> Tensor:
    return W.square().sum() / torch.linalg.matrix_norm(W, 2) ** 2


@pytest.mark.parametrize("together", [False, True])
def test_stable_rank_norm(together: bool) -> None:
    """sigma_1 = 1 and the stable rank is the target, where it was above."""
    for make, target, wanted in (
        (lambda: nn.Linear(30, 20), 5.0, 5.0),
        (lambda: nn.Linear(30, 20), 0.3, 6.0),
        (lambda: nn.Linear(30, 20), 1.0, 1.0),
        (lambda: nn.ConvTranspose2d(6, 8, 3), 2.5, 2.5),
    ):
        m = nn.Sequential(made(make))
        f = on.stable_rank_norm_ if together else lambda m, **k: on.stable_rank_norm(m[0], **k)
        f(m, target=target, n_power_iterations=300)
        W = m[0].weight.movedim(int(isinstance(m[0], nn.ConvTranspose2d)), 0).flatten(1)
        assert abs(stable_rank(W) - wanted) <= 1e-8
        assert abs(torch.linalg.matrix_norm(W, 2) - 1) <= 1e-8
        m[0].weight.sum().backward()
        assert m[0].parametrizations.weight.original.grad.isfinite().all()


def test_stable_rank_norm_leaves_low_ranks() -> None:
    layer = nn.Linear(8, 8, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([2.0] + [0.1] * 7)))
    on.stable_rank_norm(layer, target=3.0, n_power_iterations=50)
    torch.testing.assert_close(layer.weight, layer.parametrizations.weight.original / 2)
    p = layer.parametrizations.weight[0].eval()
    W = randn(8, 8).requires_grad_()
    assert torch.autograd.gradcheck(p, (W,))
    with pytest.raises(ValueError, match="target must be above 0"):
        on.stable_rank_norm(nn.Linear(2, 2), target=0.0)


@EACH_CONV
def test_stable_rank_of_the_operator(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    """sigma_1 = 1 and the stable rank of the layer as a matrix is the target; the bias stays."""
    conv = made(make)
    if conv.padding_mode in ("reflect", "replicate"):
        with pytest.raises(ValueError, match="needs zero padding"):
            on.StableRankConv(conv, size)
        return
    bias = conv.bias.detach().clone()
    m = on.StableRankConv(conv, size, 2.5)
    x = torch.zeros(1, *m.operator.domain, dtype=torch.float64)
    for _ in range(400):
        m.conv.parametrizations.weight[0].step(m.conv.parametrizations.weight.original, 1)
    m.in_channels = conv.in_channels
    M = dense(m.eval(), size)
    assert abs(torch.linalg.matrix_norm(M, 2) - 1) <= 1e-4
    assert abs(stable_rank(M) - 2.5) <= 1e-3
    torch.testing.assert_close(m(x)[0], bias.view(-1, *[1] * len(size)).expand(m.operator.range))
    m.train()
    (m(x + 1) - m(x + 2)).sum().backward()
    assert conv.parametrizations.weight.original.grad.isfinite().all()


def test_stable_rank_conv_gradient() -> None:
    conv = made(lambda: nn.Conv1d(2, 3, 3, padding=1))
    m = on.StableRankConv(conv, (6,), 2.0).eval()
    p, W = conv.parametrizations.weight, conv.parametrizations.weight.original
    x = randn(2, 2, 6).requires_grad_()

    def f(x: Tensor, W: Tensor) -> Tensor:
        return torch.func.functional_call(m, {"conv.parametrizations.weight.original": W}, (x,))

    assert p[0].shape == W.shape
    assert torch.autograd.gradcheck(f, (x, W.detach().clone().requires_grad_()))
    with pytest.raises(ValueError, match=r"x must have shape \(2, 2, 6\), got \(2, 2, 7\)"):
        m(randn(2, 2, 7))
    with pytest.raises(TypeError, match="got Linear"):
        on.StableRankConv(nn.Linear(2, 3), (6,))
    for target in (0, 0.0, -1.0):
        with pytest.raises(ValueError, match=r"^StableRankConv: target must be above 0"):
            on.StableRankConv(conv, (6,), target)
