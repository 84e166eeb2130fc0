"""Settings of param groups: keys that every optimizer takes, and the check of each value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from .. import _checks as check
from .constraints import CONSTRAINTS
from .storage import STATE_DTYPES
from .views import VIEW_DEFAULTS

NONFINITE = ("propagate", "skip", "error")
DECAYS = ("decoupled", "cautious", "clipped")


class Common(TypedDict, total=False):
    """Keyword arguments of every optimizer here, and keys of its groups with rule="matrix".

    nonfinite: how to treat a non-finite gradient: "propagate" lets it spread in its own matrix,
        "skip" leaves parameter and state and counts in group["skipped"], "error" raises before
        anything is written.
    maximize: step along the gradient instead of against it.
    heavy_ball: momentum B <- mu B + G instead of B <- mu B + (1-mu) G (optimizers with momentum).
    decay: how weight_decay acts (decay.py): "decoupled", "cautious" or "clipped".
    constraint: map applied to W after the step (constraints.py): "normalize", "hammer", "cap",
        "fast_cap", "stiefel" or None. "normalize" approaches its bound from above, within 1 % or so
        after five steps, and keeps one vector of n numbers per m x n matrix as state.
    telemetry: steps between the measurements that `optimizer.telemetry()` returns (0: never).
    mantissa: True keeps 2 more bytes for every bfloat16 weight, which make it a float32 number, and
        keeps state in float32. Steps are then those of float32 weights, to the bit
        (ops/mantissa.py), also for the AdamW companion. Refused for sharded matrices and with a
        constraint.
    state_dtype: of state of the parameter's shape; other state (bases, Gram matrices, row moments)
        is in float32 beside 16 bits too. None: the parameter's dtype. "float32": bfloat16 and
        float16 parameters have it in float32; a step computes as for float32 parameters and rounds
        the weights at its end. "bfloat16" takes 2 bytes per element, "8bit" 1.016 (storage.py);
        both are refused for sharded parameters and with mantissa.
        The setting holds for the AdamW companion too. Loading a state dict does not change it.
    stochastic_rounding: round bfloat16 weights stochastically (ops/rounding.py), and the state of
        state_dtype="bfloat16" too; numbers of other dtypes are rounded to nearest. It costs no
        memory. group["rounding_seed"] counts steps and is saved. Conda, SSO and StiefelAdam do so
        with their state only. Refused with mantissa. A constraint rounds to nearest after it.
    bound: bound of singular values over sqrt(m/n), for "clipped" decay and constraints.
    adamw: settings of groups with rule="adamw": lr (3e-4), betas (0.9, 0.95), eps (1e-8),
        weight_decay (0), and those of these options that AdamW takes.
    foreach: accepted as torch.optim's, without effect: steps always work on lists of tensors.
    fused: True makes torch.amp.GradScaler leave unscaling and skipping to the step, as with
        torch.optim's fused optimizers. That avoids a synchronization, unless the host must decide
        (`Groups._step_supports_amp_scaling`). Steps are fused in any case.
    capturable: True is refused where a CUDA graph would repeat a decision of the host: rules that
        count steps, `nonfinite` other than "propagate", telemetry, stochastic rounding.
    differentiable: must be False.
    """

    nonfinite: str
    maximize: bool
    heavy_ball: bool
    decay: str
    constraint: str | None
    mantissa: bool
    state_dtype: str | None
    stochastic_rounding: bool
    bound: float
    telemetry: int
    adamw: Mapping[str, Any] | None
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


COMMON: dict[str, Any] = {
    "nonfinite": "propagate",
    "maximize": False,
    "heavy_ball": False,
    "decay": "decoupled",
    "constraint": None,
    "mantissa": False,
    "state_dtype": None,
    "stochastic_rounding": False,
    "bound": 1.0,
    "telemetry": 0,
    **VIEW_DEFAULTS,
}
ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decay_first": True,  # decay the old weight (torch), not the updated one (Conda)
    "correct_eps": True,  # add eps to the bias-corrected root (torch), not to the raw one (Conda)
    "nonfinite": "propagate",
    "maximize": False,
    "telemetry": 0,
    "mantissa": False,
    "state_dtype": None,
    "stochastic_rounding": False,
}

ADJUST: dict[str, Callable[[int, int], float]] = {  # (m, n) -> factor of an m x n polar factor
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # kellerjordan.github.io/posts/muon
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # arXiv:2502.16982
    "spectral": lambda m, n: math.sqrt(m / n),  # arXiv:2310.17813, Dion, Scion normalized
    "spectral_max": lambda m, n: math.sqrt(max(m, n)),  # NVIDIA Emerging-Optimizers, "spectral"
    "rows": lambda m, n: math.sqrt(m),  # Scion, normalized=False
    "none": lambda m, n: 1.0,
}
ADJUST["shape_scaling"] = ADJUST["original"]  # NVIDIA's name
ADJUST["rms_norm"] = ADJUST["match_rms_adamw"]  # microsoft/dion's
for _name in ("unit_rms_norm", "spectral_norm", "spectral_unclamped"):  # NVIDIA, dion, torch 2.14
    ADJUST[_name] = ADJUST["spectral"]

Rule = Callable[[str, str, Any], None]  # optimizer, key, value: raises ValueError or TypeError


def one_of(*options: Any) -> Rule:
    return lambda name, key, value: check.choice(name, key, value, options)


def at_least(low: float) -> Rule:
    return lambda name, key, value: check.number(name, key, value, low)


def number_below(high: float) -> Rule:
    def rule(name: str, key: str, value: Any) -> None:
        check.number(name, key, value)
        if value >= high:
            raise ValueError(f"{name}: {key} must be below {high:g}, got {value}")

    return rule


def part(name: str, key: str, value: Any) -> None:
    check.number(name, key, value, 0.0, 1.0)
    check.positive(name, key, value)


def whole(low: int) -> Rule:
    return lambda name, key, value: check.integer(name, key, value, low)


def scheduled(low: float, high: float) -> Rule:
    return lambda name, key, value: check.scheduled(name, key, value, low, high)


def optional(rule: Rule) -> Rule:
    return lambda name, key, value: None if value is None else rule(name, key, value)


def betas(name: str, key: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: {key} must be two numbers, got {value!r}")
    for i, beta in enumerate(value):
        check.fraction(name, f"{key}[{i}]", beta)


FLAG = one_of(True, False)
RULES: dict[str, Rule] = {  # checks of keys that mean the same in every optimizer that has them
    "lr": scheduled(0.0, 1e30),
    "weight_decay": scheduled(0.0, 1e30),
    "nonfinite": one_of(*NONFINITE),
    "maximize": FLAG,
    "heavy_ball": FLAG,
    "transpose": FLAG,
    "mantissa": FLAG,
    "state_dtype": one_of(*STATE_DTYPES),
    "stochastic_rounding": FLAG,
    "bound": check.positive,
    "telemetry": whole(0),
    "constraint": lambda name, key, value: check.choice(name, key, value, (None, *CONSTRAINTS)),
    "momentum": scheduled(0.0, 1.0),
    "nesterov": FLAG,
    "adjust_lr_fn": one_of(None, *ADJUST),
    "betas": betas,
    "beta2": check.fraction,
    "eps": at_least(0.0),
    "decay_first": FLAG,
    "correct_eps": FLAG,
    "amsgrad": one_of(False),  # groups of torch.optim's AdamW have this and the next
    "decoupled_weight_decay": one_of(True),
}

TORCH: dict[str, Rule] = {  # checks of torch.optim keywords that groups do not store
    "foreach": one_of(None, True, False),
    "fused": one_of(None, True, False),
    "capturable": FLAG,
    "differentiable": FLAG,
    "amsgrad": one_of(False),
}


def inherited(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the AdamW companion takes from the matrix rule by default."""
    keys = (
        "maximize", "nonfinite", "telemetry", "mantissa", "state_dtype", "stochastic_rounding",
    )  # fmt: skip
    return {key: settings[key] for key in keys if key in settings}
