"""Second moments of rows, and rows divided by their roots: two passes over the whole list."""

from __future__ import annotations

from torch import Tensor

from .lines import moment


def row_moment_(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    moment(moments, X, False, (beta2, 1 - beta2, eps), eps_at, keep_norm)
