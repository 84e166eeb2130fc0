"""KellerJordan/Muon: its `muon` module on these kernels.

    from orthonorm.compat.muon import SingleDeviceMuonWithAuxAdam  # was: from muon import ...

Source: https://github.com/KellerJordan/Muon at f90a42b2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import optim
from .._polynomials import KELLER
from ..ops import muon_prologue_
from .drop_in import half

__all__ = [
    "Muon",
    "MuonWithAuxAdam",
    "SingleDeviceMuon",
    "SingleDeviceMuonWithAuxAdam",
    "adam_update",
    "muon_update",
    "zeropower_via_newtonschulz5",
]

AUX_ADAM: dict[str, Any] = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5) -> Tensor:
    """f(G / (|G|_F + 1e-7)), f `steps` of Keller Jordan's quintic: bfloat16, of the shape of G.

    Shapes: G is a matrix or a batch (..., m, n), of any floating dtype, and is rounded to bfloat16
    first, as in the original.
    """
    return half(G, "zeropower_via_newtonschulz5", KELLER, steps, 1e-7)


def muon_update(
    grad: Tensor, momentum: Tensor, beta: float = 0.95, ns_steps: int = 5, nesterov: bool = True
) -> Tensor:
    """s(G) polar(U), B <- beta B + (1-beta) G, U = beta B + (1-beta) G, s = sqrt(max(1, m/n)).

    `momentum` (B) is updated. `grad` is not modified, though the original overwrites it. Gradients
    with four dimensions are flattened to out x rest; the result is then (out, rest).
    """
    G = grad.flatten(1) if grad.dim() == 4 else grad
    buffer = momentum.view(G.shape)
    update = torch.empty_like(G)
    mu = torch.tensor(beta, dtype=torch.float64, device=grad.device)
    muon_prologue_([G], [buffer], [update], mu, nesterov)
    return zeropower_via_newtonschulz5(update, ns_steps).mul_(_factor(grad))


def adam_update(
    grad: Tensor, buf1: Tensor, buf2: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """m^ / (sqrt(v^) + eps), m <- b1 m + (1-b1) G, v <- b2 v + (1-b2) G^2, x^ = x / (1 - b^step).

    `buf1` (m) and `buf2` (v) are updated.
    """
    buf1.lerp_(grad, 1 - betas[0])
    buf2.lerp_(grad.square(), 1 - betas[1])
    first, second = (1 - beta**step for beta in betas)
    return buf1 / first / ((buf2 / second).sqrt() + eps)


def _factor(grad: Tensor) -> float:
    """Return sqrt(max(1, m / n)) of the last two dimensions; for convolutions the kernel's."""
    return math.sqrt(max(1.0, grad.shape[-2] / grad.shape[-1]))


class SingleDeviceMuon(optim.Muon, abstract=True):
    """orthonorm.optim.Muon with the arguments, defaults and shape factor of KellerJordan/Muon.

    Args:
        params: parameters or param groups, matrices and convolutions.
        lr, weight_decay, momentum: as in KellerJordan/Muon.
        **settings: further arguments of orthonorm.optim.Muon.

    Two differences: parameters without a gradient are skipped, as in torch (the original gives
    them a zero gradient, so their momentum still moves them). The norm is clamped at 1e-7 from
    below (the original adds 1e-7 to it).
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 0.02,
        weight_decay: Any = 0.0,
        momentum: float = 0.95,
        **settings: Any,
    ) -> None:
        settings = {"eps": 1e-7, **settings}
        super().__init__(params, lr, weight_decay, momentum, **settings)

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        return _factor(owner)


class SingleDeviceMuonWithAuxAdam(SingleDeviceMuon, abstract=True):
    """Muon for groups with `use_muon=True`, Adam for the others, in one optimizer.

    It loads state dicts of the original.

    Args:
        param_groups: dicts with `params`, `use_muon`, `lr`, `weight_decay`, and `momentum` or
            `betas` and `eps`; defaults as in the original.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = list(param_groups)
        for group in groups:
            if not isinstance(group, dict) or not isinstance(group.get("use_muon"), bool):
                raise ValueError(
                    f"{self.name}: every group must say use_muon=True or False, got "
                    f"{sorted(group) if isinstance(group, dict) else type(group).__name__}"
                )
        super().__init__(groups, adamw=AUX_ADAM)

    def group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        muon = group.get("use_muon", group.get("rule", "matrix") == "matrix")
        rule = "matrix" if muon else "adamw"
        return {**super().group_defaults({"rule": rule}), "rule": rule, "use_muon": muon}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for entry in state.get("state", {}).values():
            if isinstance(entry.get("step"), int):  # the original stores a Python int
                entry["step"] = torch.tensor(float(entry["step"]))
        super().__setstate__(state)


# The original's distributed classes give each rank some of the matrices and gather the weights.
# Ours compute every matrix on every rank; for DTensors orthonorm.distributed divides the work.
Muon = SingleDeviceMuon
MuonWithAuxAdam = SingleDeviceMuonWithAuxAdam
