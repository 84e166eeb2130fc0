"""f(X / (safety (|X|_F + added))): Newton-Schulz with the input scaling of other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import magnitude, newton_schulz
from ..polar import polynomial


def half(
    G: Tensor, name: str, coefficients: Any, steps: int | None = None, added: Any = 0.0
) -> Tensor:
    """Return f(X / (safety (|X|_F + added))) in bfloat16, X = G rounded to bfloat16.

    `name` stands in error messages; `added` is a number or a one-element tensor. Where a kernel
    iterates in a wider dtype, the result has fewer roundings than the original's.
    """
    check.tensor(name, "G", G, min_dim=2)
    X = G.to(torch.bfloat16)
    p = polynomial(coefficients, steps, device=G.device)
    norms = magnitude([X]) + added
    return newton_schulz(
        [X], p.coefficients, p.restarts, "auto", p.precision, p.scale, 0.0, p.safety, norms
    )[0]
