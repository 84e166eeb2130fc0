"""The parameters and layers of a model that a Monitor watches; hooks that keep no monitor alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Watched(NamedTuple):
    """Parameters and layers by name; `flat` has the ids of convolutions' parameters.

    The Monitor views a weight in `flat` as one matrix, out x rest.
    """

    parameters: dict[str, Tensor]
    layers: dict[str, nn.Linear]
    flat: set[int]


def find(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> Watched:
    """Select parameters of two or more dimensions, and linear layers, whose names match.

    A name must match a pattern of `include` and none of `exclude`. Raise ValueError if no parameter
    does.
    """

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in include) and not any(
            fnmatchcase(name, p) for p in exclude
        )

    parameters: dict[str, Tensor] = {
        name: p
        for name, p in model.named_parameters()
        if wanted(name) and not nn.parameter.is_lazy(p) and p.dim() >= 2 and p.numel() > 0
    }
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and wanted(f"{name}.weight".lstrip("."))
    }
    flat = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.modules.conv._ConvNd)
        for p in m.parameters(recurse=False)
    }
    if not parameters:
        raise ValueError(
            f"monitor: include must match a parameter of two or more dimensions, got {include}"
        )
    return Watched(parameters, layers, flat)


def weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """A hook that calls the method, on `first` and what it is given, as long as its object lives.

    Traced calls, which know nothing of weak references, do nothing.
    """
    found = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if (alive := found()) is not None:
            alive(*first, *args)

    return hook
