"""Matrices brought to a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import divide_each, magnitude, sign_
from ..ops.normalize import accumulator
from .state import Updates


def to_rms(updates: Updates, rms: float, eps: float = 0.0) -> Updates:
    """X <- rms sqrt(mn) X / (|X|_F + eps): every matrix at that root mean square; zero stays.

    X is written.
    """
    norms = magnitude.unchecked(updates.stacks) if updates.norms is None else updates.norms
    numbers = []
    for x, norm in zip(updates.stacks, norms.split(counts(updates)), strict=True):
        wanted = rms * math.sqrt(math.prod(x.shape[-2:]))
        numbers.append(torch.where(norm + eps == 0, 0.0, wanted / (norm + eps)))
    return multiply_each_(updates, torch.cat(numbers))


def to_unit(updates: Updates) -> Updates:
    """X <- X / |X|_F; zero stays zero."""
    out = [divide_each.unchecked(x, magnitude.unchecked([x]), x.dtype) for x in updates.stacks]
    return Updates(out)


def to_signs(updates: Updates) -> Updates:
    """X <- sign(X), NaN where X is not finite; X is written."""
    sign_.unchecked(updates.stacks)
    return Updates(updates.stacks)  # their norms are others now


def multiply_each_(updates: Updates, numbers: Tensor) -> Updates:
    """X <- number X, a number per matrix, 1-D; X is written.

    In the arithmetic of X: a float64 number would have torch convert every element (2026-11).
    """
    for x, c in zip(updates.stacks, numbers.split(counts(updates)), strict=True):
        x.mul_(c.to(accumulator(x)).view(*x.shape[:-2], 1, 1))
    return updates


def lengthened(updates: Updates, numbers: Tensor) -> Updates:
    """number X for sizes of any magnitude: half types, whose range they leave, become float32.

    X is written if it is not of a half type.
    """
    return multiply_each_(Updates([x.to(accumulator(x)) for x in updates.stacks]), numbers)


def sent_exactly(p: Tensor) -> bool:
    """Whether what is `lengthened` for `p` is of its dtype, as which directions are sent."""
    return accumulator(p) == p.dtype


def counts(updates: Updates) -> list[int]:
    """Matrices in every stack."""
    return [math.prod(x.shape[:-2]) for x in updates.stacks]
