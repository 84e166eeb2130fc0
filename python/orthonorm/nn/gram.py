"""Upper bounds of dense and convolutional layers by Gram iteration, and rescaling to norm 1.

Every bound is a theorem, and differentiable with exact gradients. Sources: arXiv:2305.16173
(circular padding, rescaling), arXiv:2402.00240 (zero padding); github.com/blaisedelattre/lip4conv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks as check
from ..ops import gram_iteration
from .convolution import CONVOLUTIONS, FORWARD

M = TypeVar("M", bound=nn.Module)


def _kernel(op: str, K: Tensor) -> None:
    """Raise ValueError or TypeError unless K is a kernel of 1 to 3 spatial dimensions."""
    check.tensor(op, "K", K, min_dim=3)
    if K.dim() > 5:
        raise ValueError(f"{op}: K must have 3 to 5 dimensions, got shape {check.shape(K)}")


def _grouped(op: str, K: Tensor, groups: int) -> Tensor:
    """Return K with its first axis split: (groups, outputs / groups, inputs / groups, *taps)."""
    check.integer(op, "groups", groups, 1)
    if K.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide {K.shape[0]} outputs, got {groups}")
    return K.unflatten(0, (groups, -1))


def conv_circular_bound(K: Tensor, size: Sequence[int], steps: int = 5, groups: int = 1) -> Tensor:
    """max over frequencies f of the Gram bound of K^(f): >= the norm of the circular convolution.

    A Fourier transform makes the convolution on maps of `size` block diagonal, with one block
    A + iB (outputs x inputs) per frequency. Gram iteration runs on all blocks as one batch of real
    matrices [[A, -B], [B, A]]. These have each singular value twice, which the bound divides out.
    It holds for every stride.

    Args:
        K: (outputs, inputs / groups, *taps), or the weight of a transposed convolution as stored.
        size: spatial size of the feature map, circularly padded.
        steps: Gram products k; the order of the Schatten norm is 2^(k+1).
        groups: groups of the convolution.

    Returns: a 0-d bound, differentiable; float64 if K is, else float32. Cost: 16 steps outputs^2
    inputs operations per frequency. Source: arXiv:2305.16173.
    """
    op = "conv_circular_bound"
    _kernel(op, K)
    check.integer(op, "steps", steps, 0)
    taps = K.shape[2:]
    if len(size) != len(taps):
        raise ValueError(f"{op}: size must have {len(taps)} dimensions, got {tuple(size)}")
    for n, k in zip(size, taps, strict=True):
        check.integer(op, "size", n, k)
    dims = tuple(range(3, 3 + len(taps)))
    real = K if K.dtype == torch.float64 else K.float()
    blocks = torch.fft.rfftn(_grouped(op, real, groups), s=tuple(size), dim=dims)
    A = blocks.movedim((1, 2), (-2, -1))
    top = torch.cat([A.real, -A.imag], -1)
    matrices = torch.cat([top, torch.cat([A.imag, A.real], -1)], -2).flatten(0, -3)
    bounds = gram_iteration(matrices, steps) * 2.0 ** -(0.5 ** (steps + 1))
    return bounds.max()


def conv_zero_bound(K: Tensor, steps: int = 4, groups: int = 1) -> Tensor:
    """(max_i sum_j |K_N|_ij)^(2^-N): >= the norm of the convolution with zero padding.

    C is the convolution on an infinite map and K_N, N = `steps`, the kernel of (C C^T)^(2^(N-1)).
    K_N comes from correlating kernels with themselves and has 2^N (taps - 1) + 1 taps a side. The
    bound holds for zero or circular padding, any stride and any size, because no such convolution
    has a larger norm than C.

    Args:
        K: (outputs, inputs / groups, *taps), or the weight of a transposed convolution as stored.
        steps: N, at least 1.
        groups: groups of the convolution.

    Returns: a 0-d bound, differentiable; float64 if K is, else float32. Cost: N convolutions of
    kernels with themselves, each 2^d times as large in d dimensions. Source: arXiv:2402.00240.
    """
    t, scale = _channel_sums("conv_zero_bound", K, steps, groups, short=True)
    return (t * scale).max()


def _channel_sums(
    op: str, K: Tensor, steps: int, groups: int, short: bool
) -> tuple[Tensor, Tensor]:
    """Return (t, scale) with t scale = (sum_j |K_N|_ij)^(2^-N) for every output i.

    Shapes: t (groups, outputs / groups), scale (groups, 1). `short` allows C^T in place of C where
    that has fewer outputs; the norm of both is the same, the outputs are not.
    """
    _kernel(op, K)
    check.integer(op, "steps", steps, 1)
    real = K if K.dtype == torch.float64 else K.float()
    out, scales = [], []
    for kernel in _grouped(op, real, groups):
        if short and kernel.shape[0] > kernel.shape[1]:
            kernel = kernel.transpose(0, 1)
        scale = _nonzero(torch.linalg.vector_norm(kernel.detach()))
        kernel, exponent = kernel / scale, 1.0
        for _ in range(steps):
            kernel = _correlated(kernel)
            exponent /= 2
            size = _nonzero(kernel.detach().abs().sum((1, *range(2, kernel.dim()))).amax())
            kernel, scale = kernel / size, scale * size**exponent
        sums = kernel.abs().sum((1, *range(2, kernel.dim())))
        length = kernel[0].numel()
        rounding = 1 + 8 * length * torch.finfo(kernel.dtype).eps
        out.append(_root(_with_lost(sums, -1, length, steps), exponent) * rounding)
        scales.append(scale)
    return torch.stack(out), torch.stack(scales).unsqueeze(-1)


def _with_lost(sums: Tensor, dim: int, length: int, steps: int) -> Tensor:
    """Add to the row sums what underflow may have taken from them.

    The sums of one matrix lie along `dim`; those of a zero matrix stay 0. Factors have norm 1. Each
    entry of a product loses at most `length` smallest normal numbers, and 2 `length` times what its
    factors had lost. Without this the small rows of a matrix such as diag(1e6, 500) would vanish
    from the sums and not be rescaled.
    """
    lost = (2.0 * length) ** steps * length * torch.finfo(sums.dtype).tiny
    return torch.where(sums.detach().amax(dim, keepdim=True) > 0, sums + lost, sums)


def _root(x: Tensor, exponent: float) -> Tensor:
    """Return x^exponent; value and gradient are 0 at x = 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0) ** exponent, 0.0)


def _nonzero(x: Tensor) -> Tensor:
    """Return x with 1 in place of zeros, to divide by."""
    return torch.where(x == 0, 1.0, x)


def _correlated(K: Tensor) -> Tensor:
    """Return the kernel of C C^T: for outputs o and p, the sum over i of K_oi correlated with K_pi.

    Shape: (outputs, outputs, *taps), with 2 taps - 1 in place of taps.
    """
    pad = [k - 1 for k in K.shape[2:]]
    convolve = FORWARD[K.dim() - 3]
    product: Tensor = convolve(K, K, padding=pad)
    return product


def gram_rescaling(W: Tensor, steps: int = 1) -> Tensor:
    """t_i = (sum_j |(W W^T)^(2^(N-1))|_ij)^(2^-N): W / t has norm at most 1.

    N is `steps`. N = 1 is AOL's scale (arXiv:2208.03160); a larger N brings the norm closer to 1.
    Differentiable. Cost: 2 m^2 n + 2 (N - 1) m^3 operations.

    Args:
        W: (..., m, n).

    Returns: t, (..., m, 1), 0 for a zero W; float64 if W is, else float32.

    Source: arXiv:2305.16173.
    """
    op = "gram_rescaling"
    check.tensor(op, "W", W, min_dim=2)
    check.integer(op, "steps", steps, 1)
    real = W if W.dtype == torch.float64 else W.float()
    scale = _nonzero(torch.linalg.matrix_norm(real.detach(), keepdim=True))
    X, exponent = real / scale, 1.0
    for _ in range(steps):
        X, exponent = X @ X.mT, exponent / 2
        size = _nonzero(torch.linalg.matrix_norm(X.detach(), keepdim=True))
        X, scale = X / size, scale * size**exponent
    sums = X.abs().sum(-1, keepdim=True)
    length = max(W.shape[-2:])
    rounding = 1 + 8 * length * torch.finfo(X.dtype).eps
    return _root(_with_lost(sums, -2, length, steps), exponent) * scale * rounding


def conv_rescaling(K: Tensor, steps: int = 1, groups: int = 1) -> Tensor:
    """t_i = (sum_j |K_N|_ij)^(2^-N): the convolution with K / t has norm at most 1.

    K_N, N = `steps`, the other arguments and the cost are those of `conv_zero_bound`. Holds for any
    stride and for zero or circular padding. Returns t, (outputs, 1, ..., 1).

    Source: arXiv:2402.00240, arXiv:2208.03160.
    """
    t, scale = _channel_sums("conv_rescaling", K, steps, groups, short=False)
    return (t * scale).view(-1, *[1] * (K.dim() - 1))


class SpectralRescaling(nn.Module):
    """W / t with norm at most 1: the parametrization that `spectral_rescale` registers.

    t comes from `gram_rescaling` or `conv_rescaling`. Shapes: the layer's weight, (outputs, ...).
    Cost: that of t, and one pass. Source: arXiv:2305.16173.
    """

    def __init__(self, steps: int, groups: int | None) -> None:
        super().__init__()
        self.steps, self.groups = steps, groups

    def forward(self, weight: Tensor) -> Tensor:
        if self.groups is None:
            t = gram_rescaling(weight, self.steps)
        else:
            t = conv_rescaling(weight, self.steps, self.groups)
        return (weight / _nonzero(t)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


def spectral_rescale(module: M, name: str = "weight", steps: int = 2) -> M:
    """weight = W / t with norm at most 1: a layer that is 1-Lipschitz by construction.

    Args:
        module: Linear, ConvNd or ConvTransposeNd (zero or circular padding), changed in place.
        name: the weight's name.
        steps: Gram products; more of them bring the norm closer to 1.

    `torch.nn.utils.parametrize.remove_parametrizations` removes it. Shapes: the weight is
    (outputs, ...). Cost per access: `gram_rescaling` or `conv_rescaling`, and one pass. Source:
    arXiv:2305.16173, arXiv:2402.00240.
    """
    op = "spectral_rescale"
    check.integer(op, "steps", steps, 1)
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        kind = type(module).__name__
        raise TypeError(f"{op}: module must be a Linear or a convolution, got {kind}")
    _check_padding(op, module)
    lists: Any = module._modules.get("parametrizations", {})
    if name in lists and any(isinstance(p, SpectralRescaling) for p in lists[name]):
        raise ValueError(f"{op}: {name!r} of {type(module).__name__} is rescaled already")
    groups = module.groups if isinstance(module, CONVOLUTIONS) else None
    parametrize.register_parametrization(module, name, SpectralRescaling(steps, groups))
    return module


def _check_padding(op: str, module: nn.Module) -> None:
    mode = getattr(module, "padding_mode", "zeros")
    if mode not in ("zeros", "circular"):
        raise ValueError(f"{op}: padding_mode must be 'zeros' or 'circular', got {mode!r}")


def layer_bound(layer: nn.Module, steps: int = 5) -> Tensor:
    """A certified bound >= sigma_1 of a layer: `gram_iteration` or `conv_zero_bound`.

    Args:
        layer: Linear, ConvNd or ConvTransposeNd (zero or circular padding).
        steps: Gram products; convolutions take at most 4, because each doubles the kernel.

    Returns: a 0-d tensor (shape ()), differentiable in the weight. Cost: that of the bound.

    Source: arXiv:2305.16173, arXiv:2402.00240.
    """
    op = "layer_bound"
    if isinstance(layer, nn.Linear):
        return gram_iteration(layer.weight, steps)
    if not isinstance(layer, CONVOLUTIONS):
        kind = type(layer).__name__
        raise TypeError(f"{op}: layer must be a Linear or a convolution, got {kind}")
    _check_padding(op, layer)
    return conv_zero_bound(layer.weight, min(steps, 4), layer.groups)


def norm_penalty(
    layers: Iterable[nn.Module],
    norm: Callable[[nn.Module], Tensor] = layer_bound,
    threshold: float = 0.0,
    power: float = 1.0,
) -> Tensor:
    """sum over layers of max(norm(layer) - threshold, 0)^power: a regularizer of norms.

    Args:
        layers: modules, such as all Linear layers of a model.
        norm: a differentiable norm of a layer: `layer_bound`, or for example
            `lambda m: orthonorm.spectral_norm(m.weight)` (power iteration), or
            `lambda m: conv_spectral_norm(m, (32, 32))`.
        threshold: norms up to this add nothing.
        power: 1 or more.

    Returns: a 0-d tensor (shape ()), differentiable in the weights. Cost: one `norm` per layer.
    Source: arXiv:2305.16173 (power 1), arXiv:1705.10941 (power 2, with a factor 1/2).
    """
    check.number("norm_penalty", "threshold", threshold, 0.0)
    check.number("norm_penalty", "power", power, 1.0)
    terms = [(norm(layer) - threshold).clamp(min=0.0) ** power for layer in layers]
    if not terms:
        raise ValueError("norm_penalty: layers must not be empty")
    return torch.stack(terms).sum()
