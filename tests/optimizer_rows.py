"""One row per optimizer, and what their tests share: parameters, gradients, snapshots."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from oracle_manifolds import sso, stiefel_adam
from oracle_muon import adamuon, normuon
from oracle_norms import scion, signum, trust_region
from oracle_relatives import (
    adago,
    auon,
    dion,
    dion2,
    hybrid_auon,
    muoneq,
    polargrad,
    scale,
    steepest,
    swan,
)
from oracle_whitening import shampoo, soap, splus
from oracles import oracle
from orthonorm import optim
from torch import Tensor, nn
from trusted import TrustedConda, TrustedMuon

SHAPES = ((24, 10), (10, 24), (16, 16), (1, 7), (7, 1), (1, 1), (150, 140), (33, 200))


class Row(NamedTuple):
    """An optimizer, its arguments, and a trusted implementation to follow in float64."""

    name: str
    kwargs: dict[str, Any]
    trusted: Callable[[list[Tensor]], Any]
    bad: dict[str, list[Any]]  # argument -> values it must refuse, beside those of NUMBERS
    no_decay: dict[str, Any] = {"weight_decay": 0.0}  # noqa: RUF012
    writes_gradients: bool = False
    state: Callable[[int, int], int] = lambda m, n: m * n  # elements per m x n matrix


RATE: list[Any] = [-1, math.nan, math.inf, "x", None, True, (1e-3,), torch.ones(2), torch.tensor(1),
                   torch.tensor(1j), torch.ones((), device="meta")]  # fmt: skip
NUMBERS: dict[str, list[Any]] = {  # every optimizer; a row's `bad` says more of its own
    "lr": RATE,
    "nonfinite": ["ignore", None, True, ["skip"]],
    "maximize": ["yes", None, 2],
}  # fmt: skip
NUMBER: list[Any] = [-1, math.nan, math.inf, "x", None, (0.1,), torch.tensor(0.1)]
FLAG: list[Any] = ["yes", None, 2]
MATRIX: dict[str, list[Any]] = {  # every optimizer with a matrix rule
    "heavy_ball": FLAG,
    "decay": ["l2", None],
    "constraint": ["clip", 1],
    "bound": NUMBER,
}
BETAS: list[Any] = [
    (0.9,), (0.9,) * 3, 0.9, None, "ab", (1.0, 0.9), (-0.1, 0.9), (math.nan, 0.9), ("a", "b"),
    (torch.tensor(0.9), 0.99), (True, False),
]  # fmt: skip
WHOLE: list[Any] = [0, -1, 1.5, None, "a", True]
BETA: list[Any] = [-0.1, 1.0, math.nan, "x", None]
MOMENTUM: list[Any] = [
    -0.1,
    1.5,
    math.nan,
    "x",
    None,
    (0.9, 0.99),
    torch.ones(2),
    torch.ones((), device="meta"),
]
ADAM: dict[str, list[Any]] = {"betas": BETAS, "eps": NUMBER, "weight_decay": RATE}
NEWTON_SCHULZ: dict[str, list[Any]] = {
    "eps": NUMBER,
    "ns_steps": [0, -1, 100, 2**70, 1.5, "5", True],
    "ns_coefficients": ["kelller", None, 5, (1, 2), (1, 2, 3, 4), [], [(1, 2)], (math.nan, 0, 0),
                        ("a", "b", "c"), torch.ones(3), {}, [(3.4445, -4.775, 2.0315)] * 4,
                        "aol_flipping"],
    "method": ["grams", None, ["gram"]],
    "precision": ["fp8", None, torch.float32, "exact"],
    "restarts": [None, 2, "no", [0], [9], [2.0], [3, 2]],
    **MATRIX,
}  # fmt: skip
EXPRESS = {
    "ns_coefficients": NEWTON_SCHULZ["ns_coefficients"][:10]
}  # four steps are as many as any
POLAR: dict[str, list[Any]] = {
    "momentum": MOMENTUM, "nesterov": FLAG, "weight_decay": RATE, **NEWTON_SCHULZ,
}  # fmt: skip
SCION: dict[str, list[Any]] = {
    "momentum": MOMENTUM, "norm": ["l2", None], "scale": NUMBER, "norm_eps": NUMBER,
    "normalized": ["x", 3], "transpose": FLAG, "largest": FLAG, "unconstrained": FLAG,
    **NEWTON_SCHULZ,
}  # fmt: skip
AUON: dict[str, list[Any]] = {"variant": ["x", None], "gamma": NUMBER, "norm_eps": NUMBER}

ROWS = [
    Row(
        "Muon",
        dict(lr=0.02, precision="full"),
        lambda ps: TrustedMuon(ps, lr=0.02),
        {**POLAR, "adjust_lr_fn": ["rms", 1, ["original"]]},
    ),
    Row(
        "Conda",
        dict(lr=0.01, betas=(0.9, 0.99), update_proj_gap=3, weight_decay=0.1),
        lambda ps: TrustedConda(ps, 0.01, (0.9, 0.99), update_proj_gap=3, weight_decay=0.1),
        {**ADAM, "update_proj_gap": WHOLE, "scale": NUMBER,
         **MATRIX, "decay": ["cautious", "l2"]},
        state=lambda m, n: 2 * m * n + min(m, n) ** 2,
    ),
    Row(
        "AdamW",
        dict(lr=0.01, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1, foreach=False),
        ADAM,
        state=lambda m, n: 2 * m * n + 1,
    ),
    Row(
        "NorMuon",
        dict(lr=0.02, weight_decay=0.1, precision="full"),
        oracle(normuon, lr=0.02, weight_decay=0.1),
        {**POLAR, "adjust_lr_fn": ["rms"], "beta2": BETA, "norm_eps": NUMBER,
         "axis": ["column", None], "rescale": ["x", None]},
        state=lambda m, n: m * n + m,
    ),
    Row(
        "AdaMuon",
        dict(lr=0.02, precision="full"),
        oracle(adamuon, lr=0.02),
        {**POLAR, "beta2": BETA, "norm_eps": NUMBER, "sign": FLAG, "rescale": ["norm"],
         "moment": ["x", None]},
        state=lambda m, n: 2 * m * n,
    ),
    Row(
        "Signum",
        dict(lr=0.01, weight_decay=0.1),
        oracle(signum, lr=0.01, weight_decay=0.1),
        {"momentum": MOMENTUM, "nesterov": FLAG, "weight_decay": RATE, **MATRIX},
    ),
    Row(
        "TrustRegion",
        dict(lr=0.1, norm="frobenius"),
        oracle(trust_region, lr=0.1, weight_decay=0.1, norm="frobenius", composite=False),
        {**POLAR, "norm": ["nuclear", None]},
    ),
    Row(
        "Scion",
        dict(lr=0.1, momentum=0.1, precision="full"),
        oracle(scion, lr=0.1, alpha=0.1),
        SCION,
        no_decay=dict(unconstrained=True),
    ),
    Row(
        "Shampoo",
        dict(lr=0.1, weight_decay=0.1, precondition_frequency=2, eps=0.01, max_precond_dim=64),
        oracle(shampoo, lr=0.1, weight_decay=0.1, frequency=2, eps=0.01, longest=64),
        {"momentum": MOMENTUM, "nesterov": FLAG, "weight_decay": RATE, "eps": NUMBER,
         "beta2": [-0.1, 1.1, math.nan, "x", None], "precondition_frequency": WHOLE,
         "max_precond_dim": [-1, 1.5, None, "a", True], "variant": ["x", None], **MATRIX},
        state=lambda m, n: m * n + 2 * (m * m + n * n),
    ),
    Row(
        "SOAP",
        dict(lr=0.01, weight_decay=0.1, precondition_frequency=3, max_precond_dim=0),
        oracle(soap, lr=0.01, weight_decay=0.1, frequency=3, longest=0),
        {**ADAM, "shampoo_beta": BETA[:-1], "precondition_frequency": WHOLE,
         "max_precond_dim": [-1, 1.5, None, "a", True], "variant": ["x", None], **MATRIX},
        state=lambda m, n: 2 * m * n,
    ),
    Row(
        "ScionLight",
        dict(lr=0.1, momentum=0.1, precision="full"),
        oracle(scion, lr=0.1, alpha=1.0, light=True),  # the tests set each gradient anew
        SCION,
        no_decay=dict(unconstrained=True),
        writes_gradients=True,
        state=lambda m, n: 0,
    ),
    Row(
        "AuON",
        dict(lr=0.1, weight_decay=0.1),
        oracle(auon, lr=0.1, weight_decay=0.1),
        {"momentum": MOMENTUM, "nesterov": FLAG, "weight_decay": RATE, **MATRIX, **AUON},
    ),
    Row(
        "HybridAuON",
        dict(lr=0.1, weight_decay=0.1, precision="full"),
        oracle(hybrid_auon, lr=0.1, weight_decay=0.1),
        {**POLAR, **AUON},
    ),
    Row(
        "AdaGO",
        dict(lr=0.05, precision="full"),
        oracle(adago, lr=0.05),
        {**POLAR, "gamma": [0, *NUMBER], "floor": NUMBER, "v0": [0.0, *NUMBER]},
        state=lambda m, n: m * n + 2,
    ),
    Row(
        "PolarGrad",
        dict(lr=1e-3, precision="full"),
        oracle(polargrad, lr=1e-3),
        {**POLAR, **EXPRESS, "polar_first": FLAG},
    ),
    Row(
        "MuonEq",
        dict(lr=0.02, precision="full"),
        oracle(muoneq, lr=0.02),
        {**POLAR, "adjust_lr_fn": ["rms"], "norm_eps": NUMBER, "equilibrate": ["rows", None]},
    ),
    Row(
        "SWAN",
        dict(lr=0.02, precision="full"),
        oracle(swan, lr=0.02),
        {"weight_decay": RATE, **NEWTON_SCHULZ, **EXPRESS, "norm_eps": NUMBER, "rescale": FLAG,
         "adjust_lr_fn": ["rms"]},
        state=lambda m, n: 0,
    ),
    Row(
        "SPlus",
        dict(lr=0.1, precondition_frequency=3, max_precond_dim=0),
        oracle(splus, lr=0.1, frequency=3, longest=0),
        {"momentum": MOMENTUM, "nesterov": FLAG, "weight_decay": RATE, "beta2": BETA,
         "precondition_frequency": WHOLE, "max_precond_dim": [-1, 1.5, None, "a", True], **MATRIX},
    ),
    Row(
        "SteepestDescent",
        dict(lr=1e-3, norm="head"),
        oracle(steepest, lr=1e-3, norm="head"),
        {"momentum": MOMENTUM, "weight_decay": RATE, **NEWTON_SCHULZ, "norm": ["rows", None],
         "dual": FLAG},
        state=lambda m, n: 0,
    ),
    Row(
        "Dion",
        dict(lr=0.02, rank_fraction=0.3),
        oracle(dion, lr=0.02, rank_fraction=0.3),
        {"momentum": MOMENTUM, "weight_decay": RATE, "rank_fraction": [0, *NUMBER], **MATRIX},
        state=lambda m, n: m * n + n * math.ceil(0.3 * min(m, n)),
    ),
    Row(
        "Dion2",
        dict(lr=0.02, precision="full"),
        oracle(dion2, lr=0.02),
        {"momentum": MOMENTUM, "weight_decay": RATE, **NEWTON_SCHULZ, **EXPRESS,
         "adjust_lr_fn": ["rms"], "fraction": [0, 1.1, *NUMBER],
         "beta2": BETA[:-1], "norm_eps": NUMBER},
    ),
    Row(
        "SSO",
        dict(lr=0.02, bisections=6, precision="full"),
        oracle(sso, lr=0.02, bisections=6),
        {**POLAR, **EXPRESS, "radius": [0, *NUMBER], "power_steps": WHOLE, "bisections": WHOLE,
         "retract": FLAG},
        no_decay=dict(retract=False),
        state=lambda m, n: m * n + m + n,
    ),
    Row(
        "StiefelAdam",
        dict(lr=0.02),
        oracle(stiefel_adam, lr=0.02),
        {"betas": BETAS, "eps": NUMBER, "metric": [1, math.nan, "x", None, True], **MATRIX,
         "decay": ["cautious", None]},
        no_decay={},
        state=lambda m, n: 2 * min(m, n) ** 2 + (2 * m * n if m != n else 0),
    ),
    Row(
        "SCALE",
        dict(lr=0.02),
        oracle(scale, lr=0.02),
        {"momentum": MOMENTUM, "weight_decay": RATE, **MATRIX, "norm_eps": NUMBER},
        state=lambda m, n: 0,
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


def reloaded(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Give b the state and the weights of a, through torch.save and load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for ours, theirs in zip(a.param_groups, b.param_groups, strict=True):
            for p, q in zip(ours["params"], theirs["params"], strict=True):
                q.copy_(p)


def snapshot(opt: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for g in opt.param_groups for p in g["params"]]
    states = [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*params, *states]]
