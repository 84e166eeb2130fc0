"""Scale matrices to a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import divide_each, magnitude, sign_
from ..ops.normalize import accumulator
from .state import Updates


def to_rms(updates: Updates, rms: float, eps: float = 0.0) -> Updates:
    """X <- rms sqrt(mn) X / (|X|_F + eps): scale every matrix to that root mean square.

    X is overwritten; a zero matrix stays zero.
    """
    norms = magnitude.unchecked(updates.stacks) if updates.norms is None else updates.norms
    numbers = []
    for x, norm in zip(updates.stacks, norms.split(counts(updates)), strict=True):
        wanted = rms * math.sqrt(math.prod(x.shape[-2:]))
        numbers.append(torch.where(norm + eps == 0, 0.0, wanted / (norm + eps)))
    return multiply_each_(updates, torch.cat(numbers))


def to_unit(updates: Updates) -> Updates:
    """Return X / |X|_F for every matrix, in new stacks; a zero matrix stays zero."""
    out = [divide_each.unchecked(x, magnitude.unchecked([x]), x.dtype) for x in updates.stacks]
    return Updates(out)


def to_signs(updates: Updates) -> Updates:
    """X <- sign(X), NaN where X is not finite; X is overwritten."""
    sign_.unchecked(updates.stacks)
    return Updates(updates.stacks)  # without `norms`, which no longer hold


def multiply_each_(updates: Updates, numbers: Tensor) -> Updates:
    """X <- number X; `numbers` is 1-D, one per matrix. X is overwritten.

    Numbers are cast to the arithmetic of X: with float64 ones torch would convert every element
    (2026-11).
    """
    for x, c in zip(updates.stacks, numbers.split(counts(updates)), strict=True):
        x.mul_(c.to(accumulator(x)).view(*x.shape[:-2], 1, 1))
    return updates


def lengthened(updates: Updates, numbers: Tensor) -> Updates:
    """Return number X for numbers of any size; half types become float32 to have the range.

    X is overwritten if it is not of a half type.
    """
    return multiply_each_(Updates([x.to(accumulator(x)) for x in updates.stacks]), numbers)


def sent_exactly(p: Tensor) -> bool:
    """True if `lengthened` directions of `p` have the dtype of `p`, in which ranks send them."""
    return accumulator(p) == p.dtype


def counts(updates: Updates) -> list[int]:
    """Return the number of matrices in every stack."""
    return [math.prod(x.shape[:-2]) for x in updates.stacks]
