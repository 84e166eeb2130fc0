"""Layers and models with torch's spectral norm and with ours, for the tests of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from orthonorm import nn as on
from torch import Tensor, nn
from torch.nn.utils import parametrizations

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(20, 12),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "Bilinear": lambda: nn.Bilinear(4, 3, 5),
    "Embedding": lambda: nn.Embedding(9, 5),
}
EACH_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
ORDERS = pytest.mark.parametrize("order", ["u_first", "v_first"])


def theirs(order: str) -> Callable[..., Any]:
    return parametrizations.spectral_norm if order == "u_first" else nn.utils.spectral_norm


def pair(make: Callable[[], nn.Module], order: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same layer with torch's spectral norm and with ours, from the same random vectors."""
    made = []
    for wrap in (theirs(order), lambda m, **k: on.spectral_norm(m, order=order, **k)):
        torch.manual_seed(0)
        layer = make().double()
        torch.manual_seed(1)
        made.append(wrap(layer, **options))
    return made[0], made[1]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a forward; torch's older hook computes it in one."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, None)
    return layer.weight


def original(layer: nn.Module) -> Tensor:
    plain = dict(layer.named_parameters(recurse=True))
    return next(p for n, p in plain.items() if n.endswith(("weight_orig", "weight.original")))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.Flatten(),
        nn.Linear(4 * 64, 10), nn.Tanh(), nn.Linear(10, 3),
    ).double()  # fmt: skip


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]


def twins(order: str = "u_first") -> tuple[nn.Module, nn.Module]:
    a, b = net(), net()
    for m in layers_of(a):
        on.spectral_norm(m, order=order)
    on.spectral_norm_(b, order=order)
    b.load_state_dict(a.state_dict())
    return a, b


def inputs(seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 8, 8, generator=g, dtype=torch.float64)


def found(model: nn.Module) -> list[Any]:
    from orthonorm.nn.spectral_norm import spectral_norms

    return list(spectral_norms(model))
