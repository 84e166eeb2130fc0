"""Relatives of spectral normalization: sigmaReparam and stable-rank normalization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks as check
from .normalized import SpectralNorm, as_matrix
from .spectral_norm import Make, maker, register_alone, register_together

M = TypeVar("M", bound=nn.Module)


class SigmaReparam(SpectralNorm):
    """gamma W / sigma_1(W) with a trainable scalar gamma; `sigma_reparam` makes it.

    Shapes: the layer's weight, (outputs, ...); gamma is (1,). Cost: as `spectral_norm` and one
    pass; an SVD at construction. Source: arXiv:2303.06296.
    """

    finishes = True

    def __init__(self, weight: Tensor, *rule: Any, gamma: str) -> None:
        if not weight.isfinite().all():
            raise ValueError("sigma_reparam: weight must be finite, got NaN or infinity")
        super().__init__(weight, *rule)
        U, s, Vh = torch.linalg.svd(as_matrix(weight.detach(), self.dim).to(self._u.dtype))
        self._u.copy_(U[:, 0])
        self._v.copy_(Vh[0])
        start = s[:1] if gamma == "sigma" else torch.ones_like(s[:1])
        self.gamma = nn.Parameter(start.to(weight.dtype))  # (1,): FSDP2 refuses 0-d parameters

    def finish(self, normal: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self.gamma * normal


def _scaled(op: str, steps: int, eps: float, gamma: str) -> Make:
    """Check the arguments of `op`; return the function that makes a layer's `SigmaReparam`."""
    check.choice(op, "gamma", gamma, ("sigma", "one"))
    return maker(op, SigmaReparam, steps, eps, gamma=gamma)


def sigma_reparam(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12,
    *, gamma: str = "sigma",
) -> M:  # fmt: skip
    """weight = gamma W / sigma_1(W) with a trainable scalar gamma.

    sigma_1 is found as in `spectral_norm` ("u_first"), with u and v started from the SVD.
    dL/dgamma = <G, W> / sigma. The scalar is `module.parametrizations[name][0].gamma`.
    `remove_spectral_norm` folds the result into a plain weight for inference.

    Args:
        module, name, n_power_iterations, eps: as in `spectral_norm`; weights of 2 or more
            dimensions.
        gamma: "sigma" starts gamma at sigma_1(W), which leaves the weight as it was (the vision
            code); "one" starts it at 1 (the speech code).

    Shapes: the weight is (outputs, ...), gamma (1,). Cost: an SVD at registration; each access
    costs as much as with `spectral_norm`, and one pass.

    Source: arXiv:2303.06296; github.com/apple/ml-sigma-reparam.
    """
    op = "sigma_reparam"
    return register_alone(op, module, name, _scaled(op, n_power_iterations, eps, gamma), 2)


def sigma_reparam_(
    model: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12,
    *, gamma: str = "sigma", layers: Iterable[nn.Module] | None = None,
) -> M:  # fmt: skip
    """weight = gamma W / sigma_1(W): `sigma_reparam` of all layers of `model`, computed together.

    Arguments, shapes and cost as `spectral_norm_`, and `gamma`. Source: arXiv:2303.06296.
    """
    op = "sigma_reparam_"
    make = _scaled(op, n_power_iterations, eps, gamma)
    return register_together(op, model, name, make, layers, 2)


class StableRank(SpectralNorm):
    """S + gamma (W / sigma_1 - S), S = u v^T: lowers the stable rank of a weight to a target.

    `stable_rank_norm` makes it. Shapes: the layer's weight, (outputs, ...). Cost: as
    `spectral_norm` and three passes. Source: arXiv:1906.04659.
    """

    finishes = True

    def __init__(self, weight: Tensor, *rule: Any, target: float) -> None:
        super().__init__(weight, *rule)
        self.target = target if target >= 1 else max(1.0, target * min(self.sizes))

    def finish(self, normal: Tensor, u: Tensor, v: Tensor) -> Tensor:
        A = as_matrix(normal, self.dim).to(u.dtype)
        rest = A.square().sum() - 1  # |A - u v^T|_F^2, since u^T A v = 1
        shrunk = rest > self.target - 1
        factor = (self.target - 1) ** 0.5 * torch.where(shrunk, rest, 1.0).rsqrt()
        A = torch.where(shrunk, factor * A + (1 - factor) * torch.outer(u, v), A)
        if normal.dim() > 2 or self.dim:
            A = A.view(normal.movedim(self.dim, 0).shape).movedim(0, self.dim)
        return A.to(normal.dtype)


def _lowered(op: str, steps: int, eps: float, target: float) -> Make:
    """Check the arguments of `op`; return the function that makes a layer's `StableRank`."""
    check.positive(op, "target", target)
    return maker(op, StableRank, steps, eps, target=target)


def stable_rank_norm(
    module: M, name: str = "weight", target: float = 0.5, n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> M:  # fmt: skip
    """weight = S + gamma (W / sigma_1 - S), S = u v^T: sigma_1 = 1 and stable rank at most c.

    The stable rank is |W|_F^2 / sigma_1^2; gamma = min(1, sqrt(c - 1) / |W / sigma_1 - S|_F).
    Differentiable, with u and v constant. `remove_spectral_norm` folds the result into a plain
    weight.

    Args:
        module, name, n_power_iterations, eps: as in `spectral_norm`; weights of 2 or more
            dimensions, with all axes but that of the outputs flattened.
        target: c itself if 1 or more; below 1 a fraction of min(m, n).

    Cost per access: as with `spectral_norm`, and three passes.

    Source: arXiv:1906.04659.
    """
    op = "stable_rank_norm"
    return register_alone(op, module, name, _lowered(op, n_power_iterations, eps, target), 2)


def stable_rank_norm_(
    model: M, name: str = "weight", target: float = 0.5, n_power_iterations: int = 1,
    eps: float = 1e-12, *, layers: Iterable[nn.Module] | None = None,
) -> M:  # fmt: skip
    """weight = S + gamma (W / sigma_1 - S): `stable_rank_norm` of all layers, computed together.

    Arguments, shapes and cost as `spectral_norm_`, and `target`. Source: arXiv:1906.04659.
    """
    op = "stable_rank_norm_"
    make = _lowered(op, n_power_iterations, eps, target)
    return register_together(op, model, name, make, layers, 2)
