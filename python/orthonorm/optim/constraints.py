"""W <- P(W, s) after a step, s = bound sqrt(m/n): maps of singular values, for Lipschitz control.

nn/lipschitz.py names the sources of the maps; the scale sqrt(m/n) is that of arXiv:2507.13338.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn.lipschitz import hard_cap, spectral_hammer, stiefel
from ..ops import power_iteration_
from ..ops.spectral import start_vector
from .tensors import numbers

NORMALIZE = "normalize"  # W / max(1, sigma_1 / s)
VECTOR = "constraint_vector"  # state of a normalized matrix: the vector its power steps ended at
# Power steps per optimizer step. They were tried on Gaussian matrices, five each of side 128 and
# 512, with sigma_1 above s at first. After one optimizer step sigma_1 was at most 1.06 s, after two
# 1.04 s, after five 1.01 s and after ten 1.002 s. If each step also moved W by a norm of 0.02 s, it
# was 1.01 s from the fifth on. 16 power steps from a fixed vector, at twice the cost, left up to
# 1.04 s for good (2026-11).
POWER_STEPS = 8
# Weight of the fixed vector that is added to each start. The first start is zero, so it is all of
# that one; later it brings back directions that were lost.
FRESH = 2.0**-10

# A group names its map, so that its state dict holds no code. Add a map of your own here.
CONSTRAINTS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    NORMALIZE: None,  # keeps state: `normalize_`
    "hammer": spectral_hammer,  # sigma_1 becomes s
    "cap": hard_cap,  # min(sigma, s), exactly
    "fast_cap": lambda W, s: hard_cap(W, s, "polynomial"),  # the same to 3 %
    "stiefel": lambda W, s: stiefel(W, s, "exact"),  # every sigma becomes s
}


def size(W: Tensor, bound: float) -> float:
    """Return s = bound sqrt(m/n)."""
    return bound * math.sqrt(W.shape[-2] / W.shape[-1])


def constraint_state(x: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the state of the group's constraint for a matrix (..., m, n)."""
    kept = group.get("constraint") == NORMALIZE
    return {VECTOR: (*x.shape[:-2], x.shape[-1])} if kept else {}


def constrain_(
    params: list[Tensor], group: Mapping[str, Any], state: Mapping[str, list[Tensor]]
) -> None:
    """Apply the group's constraint to every (batch of) matrices in place."""
    kind, bound = group["constraint"], group["bound"]
    if kind is None:
        return
    f = CONSTRAINTS[kind]
    if f is None:
        normalize_(params, state[VECTOR], bound)
        return
    for W in params:
        W.copy_(f(W, size(W, bound)))


def normalize_(params: list[Tensor], vectors: list[Tensor], bound: float) -> None:
    """W <- W / max(1, sigma_1 / s), sigma_1 by power steps from where the last ones ended.

    `vectors` (..., n) are the starts, and are overwritten; zeros start at a fixed vector.
    """
    fixed: dict[Any, Tensor] = {}
    for W, v in zip(params, vectors, strict=True):
        fixed.setdefault((v.shape, v.dtype), start_vector(W).to(v.dtype))
    torch._foreach_add_(vectors, [fixed[v.shape, v.dtype] for v in vectors], alpha=FRESH)
    left = [W.new_zeros(W.shape[:-1]) for W in params]
    sigma = power_iteration_.unchecked(params, left, vectors, POWER_STEPS)
    counts = [W.shape[:-2].numel() for W in params]
    sizes = [size(W, bound) for W, count in zip(params, counts, strict=True) for _ in range(count)]
    divisors = (sigma / numbers(sizes, sigma.device)).clamp(min=1.0).to(sigma.dtype)
    for W, d in zip(params, divisors.split(counts), strict=True):
        W.div_(d.view(*W.shape[:-2], 1, 1))
