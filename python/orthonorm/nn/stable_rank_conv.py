"""Stable-rank normalization of a convolution as a linear map of feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks as check
from .convolution import ConvOperator
from .spectral_norm import spectral_norm


class StableRankConv(nn.Module):
    """y = S x + gamma (A / sigma_1 - S) x + bias, S = u v^T: sigma_1 = 1, stable rank at most c.

    A is the convolution on inputs of one size; sigma_1, u and v are its top singular triple, by
    power iteration on feature maps. gamma = min(1, sqrt(c - 1) / |A / sigma_1 - S|_F). S is not a
    convolution, so the layer changes the output: y = gamma conv(x) + (1 - gamma) u <v, x> + bias,
    where conv has the normalized weight and no bias. Differentiable, with u and v constant.

    Cost: the convolution itself, two passes over the batch, and convolutions of one sample: two,
    and in training two more per power step.

    Args:
        conv: Conv1d to 3d or ConvTranspose1d to 3d, zero padding, or circular padding and a kernel
            inside the input; its weight gets `spectral_norm(conv, size=size)`.
        size: spatial size of every input.
        target: c itself if 1 or more; below 1 a fraction of the smaller of the number of entries
            of an input and of an output.
        n_power_iterations, eps: as in `spectral_norm`.

    Source: arXiv:1906.04659 (SRN), arXiv:2010.05099 (SRN-C; formulas by the former's algebra).
    """

    def __init__(
        self,
        conv: nn.Module,
        size: Sequence[int],
        target: float = 0.5,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check.positive("StableRankConv", "target", target)
        self.operator = ConvOperator(conv, size)
        self.operator.square_norm(conv.weight.detach())  # type: ignore[operator]
        rank = min(math.prod(self.operator.domain), math.prod(self.operator.range))
        self.target = target if target >= 1 else max(1.0, target * rank)
        self.conv: Any = spectral_norm(conv, "weight", n_power_iterations, eps, size=size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (N, *domain), to y, (N, *range)."""
        check.equal_shape("StableRankConv", "x", x, (len(x), *self.operator.domain))
        with parametrize.cached():
            y, W = self.conv(x), self.conv.weight
        layer = self.conv.parametrizations.weight[0]
        u, v = layer._u.clone().to(y.dtype), layer._v.clone().to(x.dtype)
        rest = self.operator.square_norm(W) - 1  # |A - u v^T|_F^2, since <u, A v> = 1
        shrunk = rest > self.target - 1
        gamma = (self.target - 1) ** 0.5 * torch.where(shrunk, rest, 1.0).rsqrt()
        gamma = torch.where(shrunk, gamma, 1.0)
        bias = 0.0
        if self.conv.bias is not None:
            bias = self.conv.bias.view(-1, *[1] * (x.dim() - 2))
        inner = (x * v).flatten(1).sum(1).view(-1, *[1] * (x.dim() - 1))
        return gamma * (y - bias) + (1 - gamma) * inner * u + bias
