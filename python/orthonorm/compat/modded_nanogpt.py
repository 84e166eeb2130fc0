"""KellerJordan/modded-nanogpt: the orthogonalization of its training script, on these kernels."""

from __future__ import annotations

from torch import Tensor

from .drop_in import half
from .muon import zeropower_via_newtonschulz5

__all__ = ["polar_express", "zeropower_via_newtonschulz5"]


def polar_express(G: Tensor, split_baddbmm: bool = False) -> Tensor:
    """f(G / (1.02 |G|_F + 1e-6)), f five steps of Polar Express: bfloat16, of the shape of G.

    Shapes: G is a matrix or a batch (..., m, n), of any floating dtype. `split_baddbmm` chooses
    between two products of the original and has no effect here.

    Source: https://github.com/KellerJordan/modded-nanogpt triton_kernels.py, arXiv:2505.16932.
    """
    return half(G, "polar_express", "polar_express_1.02", added=1e-6 / 1.02)
