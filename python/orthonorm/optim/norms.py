"""Matrices brought to a norm."""

from __future__ import annotations

import math

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
