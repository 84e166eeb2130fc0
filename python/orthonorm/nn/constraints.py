"""Constraints on weights after the steps of any optimizer, and initialization by spectral norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..exact import polar_exact
from ..ops import spectral_norm as top_triple

Map = Callable[[Tensor], Tensor]


def spectral_scale(W: Tensor) -> float:
    """sqrt(fan_out / fan_in): the spectral norm up to which y = W x has RMS(y) <= RMS(x).

    W is (fan_out, fan_in) or a convolution's weight, whose fan_in is channels times taps.
    Cost: none; only the shape is read.

    Source: arXiv:2310.17813, condition 1.
    """
    check.tensor("spectral_scale", "W", W, min_dim=2)
    return math.sqrt(W.shape[0] / math.prod(W.shape[1:]))


@torch.no_grad()
def constrain_(params: Iterable[Tensor], f: Map, scaled: bool = False) -> None:
    """W <- f(W) for every parameter, or W <- s f(W / s) with s = `spectral_scale(W)`.

    f receives matrices as they are, and weights of more dimensions as (outputs, everything else).

    Args:
        params: the weights, (outputs, ...), at least 2-D.
        f: any map of matrices, such as `functools.partial(hard_cap, cap=2.0)`.
        scaled: divide W by its `spectral_scale` before f, and multiply the result by it.

    Cost: f, and a copy of each weight.

    Raises: ValueError where f changes the shape. A weight for which f raises stays unchanged.

    Source: arXiv:2507.13338 (projection after each step, norms in units of the scale).
    """
    for W in params:
        check.tensor("constrain_", "params", W, min_dim=2)
        s = spectral_scale(W) if scaled else 1.0
        A = W.flatten(1)
        new = f(A / s if scaled else A)
        check.equal_shape("constrain_", "f(W)", new, A.shape)
        W.copy_((new * s if scaled else new).view(W.shape))


def after_step(
    optimizer: torch.optim.Optimizer, f: Map, params: Iterable[Tensor], scaled: bool = False
) -> Any:
    """W <- f(W) by `constrain_(params, f, scaled)` after every step of `optimizer`.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        f, params, scaled: as `constrain_`; params are (outputs, ...).

    Returns: a hook handle; its remove() ends the constraint. Cost: `constrain_` at every step.

    Source: arXiv:2507.13338.
    """
    weights = list(params)
    for W in weights:
        check.tensor("after_step", "params", W, min_dim=2)
    return optimizer.register_step_post_hook(lambda *_: constrain_(weights, f, scaled))


@torch.no_grad()
def spectral_init_(W: Tensor, scale: float = 1.0, kind: str = "normal") -> Tensor:
    """W <- scale sqrt(fan_out / fan_in) X / |X|_2 with random X: start at the spectral condition.

    Args:
        W: (fan_out, fan_in) or a convolution's weight, overwritten and returned.
        scale: |W|_2 in units of sqrt(fan_out / fan_in).
        kind: "normal": X is Gaussian and |X|_2 comes from power iteration, to about 1e-3.
            "orthogonal": X is the polar factor of a Gaussian matrix.

    Cost: 100 power steps, or a `polar_exact`.

    Source: arXiv:2310.17813.
    """
    name = "spectral_init_"
    check.tensor(name, "W", W, min_dim=2)
    check.number(name, "scale", scale, 0.0)
    check.choice(name, "kind", kind, ("normal", "orthogonal"))
    X = torch.randn(W.shape[0], math.prod(W.shape[1:]), device=W.device)
    X = X / top_triple(X, 100)[0] if kind == "normal" else polar_exact(X).factor
    return W.copy_((X * (scale * spectral_scale(W))).view(W.shape))
