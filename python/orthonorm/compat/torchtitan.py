"""torchtitan (0.3): an OptimizersContainer that knows the optimizers of `orthonorm.optim`.

    config.optimizer = muon_config(lr=0.02, adamw=dict(lr=3e-4))

To combine them with torchtitan's own optimizers, use this module's
`OptimizersContainer.Config(param_groups=[ParamGroupConfig(pattern, "orthonorm.Muon",
dict(lr=0.02)), ...])`. Importing this module imports torchtitan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.components import optimizer as titan

from ..optim import AdamW, MatrixOptimizer
from ..optim.configure import by_name, routed
from ..optim.split import NOT_HIDDEN, Assigned, grouped

__all__ = [
    "OptimizersContainer",
    "ParamGroupConfig",
    "muon_config",
]

PREFIX = "orthonorm."
NAMES = (*NOT_HIDDEN, "output")  # the head of torchtitan's models before it was called lm_head
ParamGroupConfig = titan.ParamGroupConfig


class OptimizersContainer(titan.OptimizersContainer):
    """torchtitan's container, in which `optimizer_name="orthonorm.Muon"` names an optimizer here.

    Of the parameters that a pattern matches, hidden matrices take the optimizer's rule, fused ones
    split. All others take its AdamW, whose settings are `optimizer_kwargs["adamw"]`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):
        """torchtitan's config; `implementation` affects only torch's own optimizers."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name.startswith(PREFIX):
            return partial(_build, by_name(name.removeprefix(PREFIX)))
        return titan.OptimizersContainer._resolve_optimizer_factory(name)

    @staticmethod
    def _build_param_groups(
        model: nn.Module, param_group_configs: Any, impl_kwargs: dict[str, Any]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        """Divide torchtitan's groups of optimizers here, as `optim.configure` divides a model."""
        groups, patterns = titan.OptimizersContainer._build_param_groups(
            model, param_group_configs, impl_kwargs
        )
        known = {id(a.p): a for a in routed(model, NAMES)}
        for name in (name for name in groups if name.startswith(PREFIX)):
            cls = by_name(name.removeprefix(PREFIX))
            parts = [_parts(cls, given, known) for given in groups[name]]
            patterns[name] = [
                x for x, made in zip(patterns[name], parts, strict=True) for _ in made
            ]
            groups[name] = [group for made in parts for group in made]
        return groups, patterns


def _build(
    cls: type[MatrixOptimizer], groups: list[dict[str, Any]], **settings: Any
) -> MatrixOptimizer:
    """Make `cls` from groups with `params` and `param_names` in two lists."""
    named = [{**g, "params": list(zip(g["param_names"], g["params"], strict=True))} for g in groups]
    for group in named:
        del group["param_names"]
    return cls(named, **settings)


def _parts(
    cls: type[MatrixOptimizer], given: dict[str, Any], known: dict[int, Assigned]
) -> list[dict[str, Any]]:
    """Return torchtitan's group as one for AdamW and one for each kind of matrices.

    It stays one if all of it is AdamW's. What it sets itself (`split`) comes before what is found.
    """
    settings = {
        k: v for k, v in given.items() if k not in ("fused", "foreach", "params", "param_names")
    }
    adamw = settings.pop("adamw", {})
    if issubclass(cls, AdamW) or settings.get("rule") == "adamw":
        return [{**settings, "params": given["params"], "param_names": given["param_names"]}]
    pairs = zip(given["param_names"], given["params"], strict=True)
    found = grouped([known[id(p)]._replace(name=name) for name, p in pairs])
    for group in found:
        group["param_names"], group["params"] = map(list, zip(*group["params"], strict=True))
    return [{**g, **(adamw if g["rule"] == "adamw" else settings)} for g in found]


def muon_config(
    optimizer: str = "Muon", pattern: str = ".*", **settings: Any
) -> OptimizersContainer.Config:
    """Return the config of one optimizer for all parameters, like torchtitan's `default_adamw`.

    Args:
        optimizer: a name of `orthonorm.optim`, in upper or lower case.
        pattern: regular expression of parameter names.
        **settings: arguments of the optimizer; `adamw` has those for all but hidden matrices.
    """
    by_name(optimizer)
    group = ParamGroupConfig(
        pattern=pattern, optimizer_name=PREFIX + optimizer, optimizer_kwargs=settings
    )
    return OptimizersContainer.Config(param_groups=[group])
