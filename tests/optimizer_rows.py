"""One row per optimizer, and what their tests share: parameters, gradients, snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from orthonorm import optim
from torch import Tensor, nn
from trusted import TrustedConda, TrustedMuon

SHAPES = ((24, 10), (10, 24), (16, 16), (1, 7), (7, 1), (1, 1), (150, 140), (33, 200))


class Row(NamedTuple):
    """An optimizer, its arguments, and a trusted implementation to follow in float64."""

    name: str
    kwargs: dict[str, Any]
    trusted: Callable[[list[Tensor]], Any]
    bad: dict[str, Any]  # argument -> a value it must refuse


ROWS = [
    Row(
        "Muon",
        dict(lr=0.02, precision="full"),
        lambda ps: TrustedMuon(ps, lr=0.02),
        dict(lr=-1.0, momentum=1.5, weight_decay=-0.1, ns_steps=0, adjust_lr_fn="rms",
             ns_coefficients="kelller", eps=-1.0, method="grams", precision="fp8", restarts=[7],
             nonfinite="ignore"),
    ),
    Row(
        "Conda",
        dict(lr=0.01, betas=(0.9, 0.99), update_proj_gap=3, weight_decay=0.1),
        lambda ps: TrustedConda(ps, 0.01, (0.9, 0.99), update_proj_gap=3, weight_decay=0.1),
        dict(lr=-1.0, betas=(0.9, 1.0), eps=-1.0, weight_decay=-0.1, update_proj_gap=0,
             scale=-1.0, nonfinite="ignore"),
    ),
    Row(
        "AdamW",
        dict(lr=0.01, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1, foreach=False),
        dict(lr=-1.0, betas=(0.9,), eps=-1.0, weight_decay=-0.1, nonfinite="ignore"),
    ),
]  # fmt: skip


def make(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def build(row: Row, params: Any, **more: Any) -> optim.MatrixOptimizer:
    return optim.REGISTRY[row.name](params, **{**row.kwargs, **more})


def set_grads(step: int, *lists: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(lists[0]):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for params in lists:
            params[i].grad = g.to(params[i].dtype, copy=True)


def snapshot(opt: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for g in opt.param_groups for p in g["params"]]
    states = [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*params, *states]]
