"""microsoft/dion: the functions that its optimizers take as `newton_schulz_func`.

    from orthonorm.compat.dion import newton_schulz_triton  # was: dion.newton_schulz_triton
    optimizer = dion.Muon(params, newton_schulz_func=newton_schulz_triton)

Each function takes G, a matrix or a batch (..., m, n) of any floating dtype, and returns bfloat16
of its shape. `epsilon` is a number or a one-element tensor.

Source: https://github.com/microsoft/dion at 0a059a45.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import polar
from .drop_in import half

__all__ = [
    "newton_schulz_triton", "newton_schulz_triton_fast", "polar_express", "polar_express_triton",
    "zeropower_via_newtonschulz5",
]  # fmt: skip


def zeropower_via_newtonschulz5(G: Tensor, epsilon: Any = 1e-7) -> Tensor:
    """f(G / (|G|_F + epsilon)), f the five quintics of @YouJiacheng."""
    return half(G, "zeropower_via_newtonschulz5", "you5", added=epsilon)


def newton_schulz_triton(G: Tensor, epsilon: Any = 1e-7) -> Tensor:
    """f(G / (|G|_F + epsilon)), f the five quintics of @YouJiacheng."""
    return half(G, "newton_schulz_triton", "you5", added=epsilon)


def newton_schulz_triton_fast(G: Tensor, epsilon: Any = 1e-7) -> Tensor:
    """f(D G), D_ii = max(sum_j |G G^T|_ij, epsilon)^(-1/2), f four quintics.

    Approximates the polar factor of D G, not of G.
    """
    return polar(G.to(torch.bfloat16), "aol", eps=float(epsilon) ** 0.5)


def polar_express(G: Tensor, epsilon: Any = 1e-6) -> Tensor:
    """f(G / (1.02 |G|_F + epsilon)), f five steps of Polar Express (arXiv:2505.16932)."""
    return half(G, "polar_express", "polar_express_1.02", added=epsilon / 1.02)


polar_express_triton = polar_express
