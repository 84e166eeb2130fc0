"""Matrices brought to a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import divide_each, magnitude
from .state import Updates


def to_rms(updates: Updates, rms: float, eps: float = 0.0) -> Updates:
    """X <- rms sqrt(mn) X / (|X|_F + eps): every matrix at that root mean square; zero stays."""
    out = []
    for stack in updates.stacks:
        m, n = stack.shape[-2:]
        divisors = (magnitude.overload([stack]) + eps) / (rms * math.sqrt(m * n))
        out.append(divide_each.overload(stack, divisors, stack.dtype))
    return Updates(out)


def to_unit(updates: Updates) -> Updates:
    """X <- X / |X|_F; zero stays zero."""
    out = [divide_each.overload(x, magnitude.overload([x]), x.dtype) for x in updates.stacks]
    return Updates(out)


def to_signs(updates: Updates) -> Updates:
    """X <- sign(X), and NaN where X is not finite: torch.sign(nan) is 0, which would hide it."""
    return Updates([x.copy_(x.sign() + (x - x)) for x in updates.stacks])


def inner(left: Updates, right: Updates) -> Tensor:
    """<X, Y> of every matrix, 1-D float64."""
    pairs = zip(left.stacks, right.stacks, strict=True)
    return torch.cat([(x * y).sum((-2, -1), dtype=torch.float64).reshape(-1) for x, y in pairs])


def multiply_each_(updates: Updates, numbers: Tensor) -> Updates:
    """X <- number X, a number per matrix, 1-D; X is written."""
    counts = [math.prod(x.shape[:-2]) for x in updates.stacks]
    for x, c in zip(updates.stacks, numbers.split(counts), strict=True):
        x.mul_(c.view(*x.shape[:-2], 1, 1))
    return updates
