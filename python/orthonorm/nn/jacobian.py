"""The nuclear norm of a network's Jacobian as a penalty, without Jacobians or SVDs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as check

Function = Callable[[Tensor], Tensor]


def jacobian_square(f: Function, x: Tensor, sigma: float = 1e-2, samples: int = 1) -> Tensor:
    """E |f(x + e) - f(x)|^2 / sigma^2 ~ |J f(x)|_F^2, e ~ N(0, sigma^2 I), for every x.

    Unbiased for linear f, otherwise off by O(sigma^2). Differentiable in the parameters of f and x.

    Args:
        f: a function of a batch, (N, ...) to (N, ...).
        x: (N, ...).
        sigma: standard deviation of the noise.
        samples: noise samples to average.

    Returns: (N,). Cost: 1 + samples calls of f. Source: arXiv:2405.14544.
    """
    op = "jacobian_square"
    check.tensor(op, "x", x, min_dim=1)
    check.positive(op, "sigma", sigma)
    check.integer(op, "samples", samples, 1)
    y, total = f(x), x.new_zeros(len(x))
    for _ in range(samples):
        difference = f(x + sigma * torch.randn_like(x)) - y
        total = total + difference.square().reshape(len(x), -1).sum(1)
    return total / (samples * sigma**2)


def jacobian_nuclear_penalty(
    g: Function, h: Function, x: Tensor, sigma: float = 1e-2, samples: int = 1
) -> Tensor:
    """mean over the batch of (|J g(h(x))|_F^2 + |J h(x)|_F^2) / 2 >= |J (g o h)(x)|_*.

    The nuclear norm of the Jacobian is the least such sum over all ways of writing the network as
    g o h. Training with the penalty therefore minimizes it. `jacobian_square` gives both terms.

    Args:
        g, h: the network's halves, f = g o h; x: (N, ...), a batch of inputs of h.
        sigma, samples: as `jacobian_square`.

    Returns: a 0-d tensor. Cost: 2 + samples calls of h, 1 + samples of g.

    Source: arXiv:2405.14544.
    """
    square = jacobian_square(g, h(x), sigma, samples) + jacobian_square(h, x, sigma, samples)
    return 0.5 * square.mean()
