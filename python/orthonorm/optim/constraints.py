"""W <- P(W, s) after a step, s = bound sqrt(m/n): maps of singular values, as Lipschitz control.

Sources are those of the maps, in nn/lipschitz.py; the scale sqrt(m/n) is that of arXiv:2507.13338.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..nn.lipschitz import hard_cap, spectral_hammer, spectral_normalize, stiefel

# A group names its map, so that its state dict holds no code; a map of your own is added here.
CONSTRAINTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "normalize": spectral_normalize,  # W / max(1, sigma_1 / s)
    "hammer": spectral_hammer,  # sigma_1 becomes s
    "cap": hard_cap,  # min(sigma, s), exactly
    "fast_cap": lambda W, s: hard_cap(W, s, "polynomial"),  # the same to 3 %
    "stiefel": lambda W, s: stiefel(W, s, "exact"),  # every sigma becomes s
}


def size(W: Tensor, bound: float) -> float:
    """s = bound sqrt(m/n)."""
    return bound * math.sqrt(W.shape[-2] / W.shape[-1])


def constrain_(params: list[Tensor], kind: str, bound: float) -> None:
    """Map every (batch of) matrices in place."""
    for W in params:
        W.copy_(CONSTRAINTS[kind](W, size(W, bound)))
