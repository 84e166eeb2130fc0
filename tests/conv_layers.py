"""Convolutions of every kind, and what they are as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The layer without its bias as a matrix, column by column."""
    channels = layer.in_channels
    x = torch.eye(channels * math.prod(size), dtype=torch.float64).view(-1, channels, *size)
    with torch.no_grad():
        zero = torch.zeros(1, channels, *size, dtype=torch.float64)
        return (layer(x) - layer(zero)).flatten(1).T


CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 3), (9,)),
    "padded": (lambda: nn.Conv2d(2, 3, 3, padding=1), (5, 6)),
    "wide padding": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 3)), (5, 6)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (6, 7)),
    "stride skips": (lambda: nn.Conv2d(2, 3, 2, stride=3), (7, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 5)),
    "same, even": (lambda: nn.Conv2d(2, 2, (4, 3), padding="same"), (5, 6)),
    "valid": (lambda: nn.Conv2d(2, 2, 3, padding="valid"), (5, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (5, 6)),
    "replicate": (lambda: nn.Conv2d(2, 3, 3, 2, padding=2, padding_mode="replicate"), (5, 6)),
    "3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), (3, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3), (4, 5)),
    "transposed, strided": (
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5)
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, dilation=2), (6,)),
}  # fmt: skip
EACH_CONV = pytest.mark.parametrize(("make", "size"), CONVS.values(), ids=CONVS)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()
