"""Convert state dicts of other libraries' optimizers for the optimizers here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from .. import _checks as check
from ..ops.rotations import rotated
from .base import MatrixOptimizer
from .state import MANTISSA, shapes
from .storage import SCALES

State = dict[str, Any]
Converted = tuple[str, State, dict[str, Any]]  # rule, state of a parameter, settings of its group


def convert_state_dict(
    saved: Mapping[str, Any] | str | os.PathLike[str],
    layout: str,
    optimizer: MatrixOptimizer,
    params: Iterable[Any],
) -> dict[str, Any]:
    """Convert `saved`, of another library's optimizer, for `optimizer.load_state_dict`.

    Args:
        saved: a state dict, or a file that holds one (loaded with weights_only=True).
        layout: a name of LAYOUTS:
            "keller": KellerJordan/Muon's Muon, SingleDeviceMuon and SingleDeviceMuonWithAuxAdam;
            "keller_sorted": its MuonWithAuxAdam, which sorts the matrices of a group by shape;
            "moonlight": MoonshotAI/Moonlight's Muon. Its momentum B <- mu B + G is multiplied by
                1 - mu; its AdamW adds eps to the uncorrected root;
            "dion": microsoft/dion's Muon, NorMuon, Dion, Dion2 and NorDion2, with their AdamW;
            "conda": jie040109/Conda's Conda.
        optimizer: the optimizer that will load it, of the class with the same rule. Its groups may
            differ from the saved ones.
        params: arguments of the other optimizer, in its order: parameters, named parameters or
            param groups (Moonlight: muon_params, then adamw_params).

    Learning rates and other settings of the saved groups replace those of the optimizer's groups.
    The caller must set views (`flatten`, `split`) that agree with how the other library made
    matrices of its weights, 4-D ones for example.

    Raises: ValueError or TypeError where states or settings do not fit; it names the parameter if
    one is at fault. Neither the optimizer nor its parameters are written.

    Source: github.com/KellerJordan/Muon at 00ba60d3, MoonshotAI/Moonlight at abaa96ec,
    microsoft/dion at 0c205499 and 2e9df450, jie040109/Conda at df83c107.
    """
    name = "convert_state_dict"
    check.choice(name, "layout", layout, LAYOUTS)
    if isinstance(saved, (str, os.PathLike)):
        saved = read(saved)
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
        raise TypeError(f"{name}: saved must be a dict of 'state' and 'param_groups', got {got}")
    if not isinstance(optimizer, MatrixOptimizer):
        raise TypeError(
            f"{name}: optimizer must be a MatrixOptimizer, got {type(optimizer).__name__}"
        )
    theirs = _ordered(params, sort=layout == "keller_sorted")
    groups = {i: g for g in saved["param_groups"] for i in g["params"]}
    if len(groups) != len(theirs):
        raise ValueError(
            f"{name}: params must be those of the saved optimizer, {len(groups)}, got {len(theirs)}"
        )
    index = {id(p): i for i, p in zip(groups, theirs, strict=True)}
    result: dict[str, Any] = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    for group, packed in zip(optimizer.param_groups, result["param_groups"], strict=True):
        found: list[tuple[str, dict[str, Any]]] = []
        for k, (p, place) in enumerate(zip(group["params"], packed["params"], strict=True)):
            label = f"{name}: parameter {optimizer.label(group, k)}"
            if id(p) not in index:
                raise ValueError(f"{label} must be among params")
            i = index[id(p)]
            rule, state, settings = LAYOUTS[layout](saved["state"].get(i, {}), groups[i], p)
            _check(label, optimizer, group, p, rule, state)
            found.append((label, settings))
            if state:
                result["state"][place] = state
        packed.update(_agreed(found, group))
    return result


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a file with weights_only=True; Conda's projectors become stand-ins with their data."""
    with safe_globals([(Projector, module + ".CondaProjector") for module in PROJECTORS]):
        loaded: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return loaded


class Projector:
    """Stand-in for a CondaProjector of a file: `ortho_matrix` and settings."""

    ortho_matrix: Tensor | None = None
    proj_type: str = "std"


PROJECTORS = ("conda_torch.projector", "conda_torch.conda", "projector", "conda")


def _ordered(params: Iterable[Any], sort: bool) -> list[Tensor]:
    entries: list[Any] = list(params)
    lists = [list(e["params"]) for e in entries if isinstance(e, Mapping)] or [entries]
    for i, entry in enumerate(entries):
        if sort and isinstance(entry, Mapping) and entry.get("use_muon"):
            lists[i].sort(key=lambda p: p.size(), reverse=True)
    return [e[1] if isinstance(e, tuple) else e for part in lists for e in part]


def _check(
    label: str,
    optimizer: MatrixOptimizer,
    group: dict[str, Any],
    p: Tensor,
    rule: str,
    state: State,
) -> None:
    if rule != group["rule"]:
        raise ValueError(f"{label} must be in a group with rule={rule!r}, got {group['rule']!r}")
    made = shapes(optimizer, p, group)  # loading makes mantissas and scales itself
    wanted = {key for key in made if key != MANTISSA and SCALES not in key}
    wanted |= {"step"} if optimizer.counts_steps else set()
    if state and wanted != set(state):
        raise ValueError(
            f"{label}: {optimizer.name} has the state {sorted(wanted)}, the saved one gives "
            f"{sorted(state)}"
        )


def _agreed(found: list[tuple[str, dict[str, Any]]], group: dict[str, Any]) -> dict[str, Any]:
    """Return the saved settings of a group's parameters, which must agree, that its rule has."""
    settings = {k: v for k, v in found[0][1].items() if k in group or k == "initial_lr"}
    for label, other in found[1:]:
        for key, value in settings.items():
            if other.get(key) != value:
                raise ValueError(
                    f"{label}: a group must have one {key}, got {other.get(key)} beside {value}"
                )
    return settings


# ---- layouts: (state, group, parameter) -> rule, our state, our settings -------------------------


def _common(group: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: group[k] for k in ("lr", "initial_lr", *keys) if k in group}


def _adam(first: Any, second: Any, step: Any) -> State:
    step = torch.as_tensor(step, dtype=torch.float32).reshape(())
    return {"step": step, "exp_avg": first, "exp_avg_sq": second}


def _lerped(buffer: Tensor, mu: float) -> Tensor:
    """Convert momentum B <- mu B + G to B <- mu B + (1-mu) G."""
    if not mu < 1:
        raise ValueError(f"convert_state_dict: momentum must be below 1, got {mu}")
    return buffer * (1 - mu)


def _keller(state: State, group: Mapping[str, Any], p: Tensor) -> Converted:
    if group.get("use_muon", "momentum" in group):
        settings = _common(group, "momentum", "weight_decay")
        return "matrix", dict(state), {**settings, "nesterov": True, "adjust_lr_fn": "original"}
    found = _adam(state["exp_avg"], state["exp_avg_sq"], state["step"]) if state else {}
    return "adamw", found, _common(group, "betas", "eps", "weight_decay")


def _moonlight(state: State, group: Mapping[str, Any], p: Tensor) -> Converted:
    settings = {**_common(group), "weight_decay": group["wd"]}
    if state["use_muon"]:
        found = {}
        if "momentum_buffer" in state:
            buffer = _lerped(state["momentum_buffer"], group["momentum"]).view(p.shape)
            found["momentum_buffer"] = buffer
        settings |= _common(group, "momentum", "nesterov", "ns_steps")
        return "matrix", found, {**settings, "adjust_lr_fn": "match_rms_adamw"}
    found = _adam(state["moment1"], state["moment2"], state["step"]) if "step" in state else {}
    settings |= {"betas": group["adamw_betas"], "eps": group["adamw_eps"], "correct_eps": False}
    return "adamw", found, settings


def _dion(state: State, group: Mapping[str, Any], p: Tensor) -> Converted:
    algorithm, step = group["algorithm"], int(group["step"])
    check.choice("convert_state_dict", "algorithm", algorithm, (*DION, "adamw"))
    settings = _common(group, "weight_decay", "nesterov", "fraction", "rank_fraction")
    if algorithm == "adamw":
        found = _adam(state["momentum"], state["variance"], step) if step else {}
        betas = (group["beta1"], group["beta2"])
        return "adamw", found, {**settings, "betas": betas, "eps": group["epsilon"]}
    settings["momentum"] = mu = group.get("mu", group.get("ef_decay"))
    if "adjust_lr" in group:
        settings["adjust_lr_fn"] = group["adjust_lr"] or "none"
    if "muon_beta2" in group:
        settings |= {"beta2": group["muon_beta2"], "norm_eps": 1e-8}
    found = {DION[algorithm].get(k, k): v for k, v in state.items()} if step else {}
    if "momentum_buffer" in found:
        found["momentum_buffer"] = _lerped(found["momentum_buffer"], mu)
    if algorithm == "dion" and found:
        found["step"] = step
    return "matrix", found, settings


DION: dict[str, dict[str, str]] = {  # algorithm -> names of its state here
    "muon": {"momentum": "momentum_buffer"},
    "normuon": {"momentum": "momentum_buffer", "variance_neuron": "row_moment"},
    "dion": {"momentum": "residual_buffer", "Q": "right_basis"},
    "dion2": {"momentum": "residual_buffer"},
    "nordion2": {"momentum": "residual_buffer", "variance_neuron": "row_moment"},
}


def _conda(state: State, group: Mapping[str, Any], p: Tensor) -> Converted:
    name = "convert_state_dict"
    check.choice(name, "correct_bias", group.get("correct_bias", True), (True,))
    settings = _common(group, "betas", "eps", "weight_decay", "update_proj_gap", "scale")
    if "update_proj_gap" not in group:
        found = _adam(state["exp_avg"], state["exp_avg_sq"], state["step"]) if state else {}
        return "adamw", found, {**settings, "decay_first": False, "correct_eps": False}
    if not state:
        return "matrix", {}, settings
    projector = state["projector"]
    check.choice(name, "proj_type", projector.proj_type, ("std",))
    Q = projector.ortho_matrix
    basis = Q.mT if p.shape[0] >= p.shape[1] else Q  # theirs is V^T or U
    found = {
        "exp_avg": rotated(state["exp_avg"], basis),
        "exp_avg_sq": state["exp_avg_sq"],
        "basis": basis.contiguous(),
        "step": int(state["step"]),
    }
    return "matrix", found, settings


LAYOUTS: dict[str, Callable[[State, Mapping[str, Any], Tensor], Converted]] = {
    "keller": _keller,
    "keller_sorted": _keller,
    "moonlight": _moonlight,
    "dion": _dion,
    "conda": _conda,
}
