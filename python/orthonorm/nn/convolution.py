"""A convolution as a linear map y = A x of feature maps of one size, and its adjoint A^T y."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from .. import _checks as check
from ..ops.spectral import start_vector

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (*PLAIN, *TRANSPOSED)
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
FORWARD: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)  # by spatial dimensions - 1
BACKWARD: tuple[Any, ...] = (conv1d_input, conv2d_input, conv3d_input)


def paddings(conv: Any) -> list[tuple[int, int]]:
    """Return how many entries are added before and behind each dimension of the input."""
    if conv.padding == "same":  # an odd entry goes behind, as in torch
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    return [(p, p) for p in conv.padding]


class ConvOperator:
    """y = A x, the map of a convolution for inputs of one spatial size; any stride and padding.

    A transposed convolution is the adjoint of the convolution C with the same weight. Both kinds
    are therefore computed by C: A = C, or A = C^T. Padding other than zeros repeats entries of the
    input; an index list per dimension names the entry behind each padded position.

    Args:
        conv: a Conv1d to 3d or ConvTranspose1d to 3d; its weight is passed to every call.
        size: the spatial size of its input.

    Attributes:
        domain, range: shapes of x and y without a batch: (channels, *size).

    Cost per call: a convolution, or a transposed one, of one feature map.

    Raises: TypeError for other modules, ValueError for sizes that do not fit.

    Source: arXiv:1811.07457; torch's own convolutions.
    """

    def __init__(self, conv: nn.Module, size: Sequence[int]) -> None:
        name = "ConvOperator"
        if not isinstance(conv, CONVOLUTIONS):
            raise TypeError(f"{name}: conv must be a convolution, got {type(conv).__name__}")
        dims = len(conv.kernel_size)
        check.choice(name, "padding_mode", conv.padding_mode, PADDING_MODES)
        if len(size) != dims:
            raise ValueError(f"{name}: size must have {dims} dimensions, got {tuple(size)}")
        for n in size:
            check.integer(name, "size", n, 1)
        self.transposed = isinstance(conv, TRANSPOSED)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.mode, self.pads, self.dims = conv.padding_mode, paddings(conv), dims
        self.weight = tuple(conv.weight.shape)
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = list(zip(size, self.stride, self.pads, reach, strict=True))
        if self.transposed:
            extra = conv.output_padding
            other = [(n - 1) * s - sum(p) + r + e + 1
                     for (n, s, p, r), e in zip(sides, extra, strict=True)]  # fmt: skip
        else:
            other = [(n + sum(p) - r - 1) // s + 1 for n, s, p, r in sides]
        if min(other) < 1:
            raise ValueError(f"{name}: size must leave an output, got {tuple(size)}")
        self.domain = (conv.in_channels, *size)
        self.range = (conv.out_channels, *other)
        self._index = [
            self._padded(n, p) for n, p in zip(self._inner()[1:], self.pads, strict=True)
        ]

    def _inner(self) -> tuple[int, ...]:
        """Return the shape of inputs of C."""
        return self.range if self.transposed else self.domain

    def _padded(self, n: int, pad: tuple[int, int]) -> list[int] | None:
        """Return the input's index behind each of the padded positions; None for zero padding."""
        if self.mode == "zeros":
            return None
        entries = torch.arange(n, dtype=torch.float64).view(1, 1, n)
        return [int(i) for i in F.pad(entries, pad, mode=self.mode).flatten()]

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return A x for x of shape `domain`; differentiable in weight and x."""
        return self._adjoint(weight, x) if self.transposed else self._forward(weight, x)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Return A^T y for y of shape `range`."""
        return self._forward(weight, y) if self.transposed else self._adjoint(weight, y)

    def form(self, weight: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return <y, A x>, differentiable in the weight."""
        x, y = (y, x) if self.transposed else (x, y)
        return (self._forward(weight, x) * y).sum()

    def square_norm(self, weight: Tensor) -> Tensor:
        """Return |A|_F^2.

        Every nonzero entry of A is one weight. C with squared weights, applied to ones, therefore
        sums the squares of the entries.

        Raises: ValueError where padding makes one entry of A the sum of several weights.
        """
        sides = list(zip(self._inner()[1:], self.weight[2:], self.dilation, strict=True))
        alone = self.mode == "zeros" or (
            self.mode == "circular" and all(d * (k - 1) < n for n, k, d in sides)
        )
        if not alone:
            raise ValueError(
                "ConvOperator: |A|_F needs zero padding, or circular padding and a kernel inside "
                f"the input, got padding_mode={self.mode!r}"
            )
        return self._forward(weight.square(), weight.new_ones(self._inner())).sum()

    def _forward(self, weight: Tensor, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        if self.mode == "zeros":
            x = F.pad(x, [p for pad in reversed(self.pads) for p in pad])
        else:
            for d, index in enumerate(self._index):
                x = x.index_select(d + 2, torch.tensor(index, device=x.device))
        convolve = FORWARD[self.dims - 1]
        y: Tensor = convolve(x, weight, None, self.stride, 0, self.dilation, self.groups)
        return y.squeeze(0)

    def _adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        channels, *sizes = self._inner()
        whole = [n + sum(p) for n, p in zip(sizes, self.pads, strict=True)]
        back = BACKWARD[self.dims - 1]
        shape, y = (1, channels, *whole), y.unsqueeze(0)
        x: Tensor = back(shape, weight, y, self.stride, 0, self.dilation, self.groups)
        for d, (n, pad, index) in enumerate(zip(sizes, self.pads, self._index, strict=True)):
            if index is None:
                x = x.narrow(d + 2, pad[0], n)
            else:
                sums = x.new_zeros((*x.shape[: d + 2], n, *x.shape[d + 3 :]))
                x = sums.index_add(d + 2, torch.tensor(index, device=x.device), x)
        return x.squeeze(0)

    @torch.no_grad()
    def power_iteration(
        self, weight: Tensor, u: Tensor, v: Tensor, steps: int, order: str, eps: float
    ) -> None:
        """u <- A v / |A v|, v <- A^T u / |A^T u| (or v, then u), in place, `steps` times.

        Follows the rules of `ops.power_iteration_`: a zero product keeps the earlier vector, and u
        and v both stay unchanged if a result is not finite.
        """
        left, right = u.to(weight.dtype), v.to(weight.dtype)
        for _ in range(steps):
            if order == "u_first":
                left = _unit(self(weight, right), left, eps)
                right = _unit(self.adjoint(weight, left), right, eps)
            else:
                right = _unit(self.adjoint(weight, left), right, eps)
                left = _unit(self(weight, right), left, eps)
        finite = left.isfinite().all() & right.isfinite().all()
        u.copy_(torch.where(finite, left.to(u.dtype), u))
        v.copy_(torch.where(finite, right.to(v.dtype), v))


def _unit(y: Tensor, before: Tensor, eps: float) -> Tensor:
    """Return y / max(|y|, eps), or `before` if y is zero."""
    norm = torch.linalg.vector_norm(y)
    return torch.where(norm == 0, before, y / norm.clamp(min=max(eps, torch.finfo(y.dtype).tiny)))


def conv_spectral_norm(
    conv: nn.Module, size: Sequence[int], steps: int = 100, start: Tensor | None = None
) -> Tensor:
    """sigma_1 of the map y = A x of a convolution, by power iteration; d sigma / d A = u v^T.

    A lower bound whose relative error falls as (sigma_2 / sigma_1)^(4 steps). Differentiable in
    `conv.weight`. Cost: two convolutions of one feature map per step.

    Args:
        conv: Conv1d to 3d or ConvTranspose1d to 3d, any padding mode, stride, dilation, groups.
        size: spatial size of its input.
        steps: power steps.
        start: the first v, (in_channels, *size); None takes a fixed vector.

    Source: arXiv:1811.07457 (power iteration by convolutions).
    """
    op = "conv_spectral_norm"
    check.integer(op, "steps", steps, 1)
    A = ConvOperator(conv, size)
    W: Tensor = conv.weight  # type: ignore[assignment]
    if start is None:
        start = start_vector(W.new_empty(0, math.prod(A.domain))).view(A.domain).to(W.dtype)
    check.equal_shape(op, "start", start, A.domain)
    u, v = W.new_zeros(A.range), start.clone()
    A.power_iteration(W.detach(), u, v, steps, "u_first", 0.0)
    return A.form(W, u, v)
