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
from torchtitan.components import optimizer as titan

from ..optim import MatrixOptimizer
from ..optim.configure import by_name
from ..optim.split import NOT_HIDDEN, is_hidden

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

    Of the parameters that a pattern matches, hidden matrices take the optimizer's rule. All others
    take its AdamW, whose settings are `optimizer_kwargs["adamw"]`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):
        """torchtitan's config; `implementation` affects only torch's own optimizers."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name.startswith(PREFIX):
            return partial(_build, by_name(name.removeprefix(PREFIX)))
        return titan.OptimizersContainer._resolve_optimizer_factory(name)


def _build(
    cls: type[MatrixOptimizer], groups: list[dict[str, Any]], **settings: Any
) -> MatrixOptimizer:
    """Make `cls` from torchtitan's groups, each split into hidden matrices and the rest."""
    split = []
    for given in groups:
        keys = {k: v for k, v in given.items() if k not in ("fused", "foreach")}
        pairs = list(zip(keys.pop("param_names"), keys.pop("params"), strict=True))
        rules = {"adamw": keys.pop("adamw", {}), "matrix": keys}
        for rule, values in rules.items():
            params = [x for x in pairs if is_hidden(*x, adamw=NAMES) == (rule == "matrix")]
            if params:
                split.append({"params": params, "rule": rule, **values})
    return cls(split, **settings)


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
