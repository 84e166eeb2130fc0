"""Public K3 functions: power iteration, differentiable spectral norms, certified upper bounds."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops
from ._checks import tensors
from .ops.normalize import accumulator
from .ops.spectral import start_vector

Matrices = TypeVar("Matrices", Tensor, list[Tensor])


def power_iteration(
    W: Matrices,
    u: Matrices | None = None,
    v: Matrices | None = None,
    steps: int = 1,
    order: str = "u_first",
    eps: float = 0.0,
) -> tuple[Tensor, Matrices, Matrices]:
    """u <- W v / |W v|, v <- W^T u / |W^T u| (or v, then u), `steps` times; sigma = u^T W v.

    The arguments are not modified; `ops.power_iteration_` updates buffers in place. Cost: one pass
    over W per step.

    Args:
        W: a (batch of) matrices (..., m, n), or a list of them.
        u, v: the first vectors, (..., m) and (..., n); None takes a fixed vector.
        steps: power steps; 0 only evaluates sigma.
        order: "u_first" (torch's spectral_norm parametrization) or "v_first" (the legacy hook).
        eps: lower clamp of the norms; 0 makes the step independent of the scale of W.

    Returns: sigma (the batch's shape; 1-D, flattened, for a list), u and v. sigma is a lower bound
    of sigma_1, float64 if W is, else float32.
    """
    single = isinstance(W, Tensor)
    matrices = _listed("W", W, 2)
    left = _started("u", u, [x.mT for x in matrices])
    right = _started("v", v, matrices)
    with torch.no_grad():
        sigma = ops.power_iteration_([x.detach() for x in matrices], left, right, steps, order, eps)
    vectors: Any = (left[0], right[0]) if single else (left, right)
    return sigma.view(matrices[0].shape[:-2]) if single else sigma, *vectors


def _listed(name: str, given: object, min_dim: int) -> list[Tensor]:
    """Return a tensor or a list of tensors as a list; raise if it is anything else."""
    listed = [given] if isinstance(given, Tensor) else given
    tensors("power_iteration", name, listed, min_dim)
    return list(listed)  # type: ignore[call-overload]


def _started(name: str, given: object, sides: list[Tensor]) -> list[Tensor]:
    """Return copies of the given vectors, or fixed vectors x for products A x, A in `sides`."""
    if given is None:
        return [start_vector(x) for x in sides]
    return [
        x.to(accumulator(x), copy=True, memory_format=torch.contiguous_format)
        for x in _listed(name, given, 1)
    ]


def spectral_norm(W: Tensor, steps: int = 32, start: Tensor | None = None) -> Tensor:
    """sigma_1(W) by power iteration from a fixed start; d sigma / d W = u v^T.

    A lower bound whose relative error falls as (sigma_2 / sigma_1)^(4 steps).

    Args:
        W: a (batch of) matrices (..., m, n).
        steps: power steps, each one pass over W.
        start: the first v, (..., n), at any scale, not zero.

    Returns: sigma, shape (...), float64 if W is, else float32.
    """
    sigma, _, _ = ops.spectral_norm(W, steps, start)
    return sigma


def gram_iteration(W: Tensor, steps: int = 5) -> Tensor:
    """(sum_i sigma_i^(2^(k+1)))^(2^-(k+1)): never below sigma_1, and tends to it as k grows.

    The Schatten norm of order 2^(k+1), raised by a bound on the rounding; differentiable.

    Args:
        W: a (batch of) matrices (..., m, n).
        steps: k, Gram products on the short side.

    Returns: the bound, shape (...), float64 if W is, else float32. Source: arXiv:2305.16173.
    """
    return ops.gram_iteration(W, steps)
