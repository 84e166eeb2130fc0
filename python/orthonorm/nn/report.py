"""A bound of a whole network's Lipschitz constant, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .convolution import CONVOLUTIONS
from .gram import layer_bound

Rule = Callable[[nn.Module], float]

# Largest slopes, rounded up: GELU has 1.1290 at sqrt(2), SiLU 1.0998, Mish 1.0885.
SLOPES: Mapping[type[nn.Module], float] = {
    nn.Identity: 1.0, nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.Tanh: 1.0, nn.Sigmoid: 0.25,
    nn.Softplus: 1.0, nn.LogSigmoid: 1.0, nn.Hardtanh: 1.0, nn.Softsign: 1.0,
    nn.GELU: 1.129, nn.SiLU: 1.0999, nn.Mish: 1.0886, nn.Hardswish: 1.5,
    nn.Flatten: 1.0, nn.Unflatten: 1.0, nn.Softmax: 1.0,
}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class LipschitzReport:
    """Rows (path, kind, bound) of the modules of a chain, and the product of their bounds."""

    rows: tuple[tuple[str, str, float], ...]

    @property
    def bound(self) -> float:
        return math.prod(value for _, _, value in self.rows)

    def __str__(self) -> str:
        width = max((len(path) for path, _, _ in self.rows), default=0)
        lines = [f"{path:{width}}  {kind:20} {value:12.6g}" for path, kind, value in self.rows]
        return "\n".join([*lines, f"{'product':{width}}  {'':20} {self.bound:12.6g}"])


def lipschitz_report(
    model: nn.Module, rules: Mapping[type[nn.Module], Rule] | None = None
) -> LipschitzReport:
    """|f(x) - f(y)|_2 <= prod_l L_l |x - y|_2 for a chain of layers, each bound L_l a theorem.

    Bounds linear and convolutional layers by Gram iteration (`layer_bound`), activations by their
    largest slope, and batch norms in evaluation by their largest factor. A chain is an
    `nn.Sequential`, nested in any way. A module with a forward of its own needs a rule, subclasses
    of these included, because what it does with its weights or children is unknown.

    Args:
        model: the network; weights are taken as they are now.
        rules: {module type: function of the module that returns its bound}; they come before the
            built-in bounds. For a residual block x + f(x):
            `lambda m: 1 + lipschitz_report(m.f).bound`.

    Returns: a `LipschitzReport`, rows of (path, kind, bound). Cost: a `layer_bound` of each layer.

    Raises: TypeError naming a module without a rule.

    Source: arXiv:1312.6199, section 4.3; bounds of layers as `layer_bound`.
    """
    was = {m: m.training for m in model.modules()}
    model.eval()  # so that reading weights takes no power steps
    try:
        with torch.no_grad():
            return LipschitzReport(tuple(_rows("", model, rules or {})))
    finally:
        for m, training in was.items():
            m.training = training


def _rows(
    path: str, module: nn.Module, rules: Mapping[type[nn.Module], Rule]
) -> list[tuple[str, str, float]]:
    """Return (path, kind, bound) of a module, or of each child if it is a chain without a rule."""
    kinds = type(module).__mro__
    rule = next((rules[k] for k in kinds if k in rules), None)
    if rule is None and _runs(module, nn.Sequential):  # a child that it runs twice counts twice
        return [
            row for name, child in module._modules.items() if child is not None
            for row in _rows(f"{path}.{name}" if path else name, child, rules)
        ]  # fmt: skip
    value = float(rule(module)) if rule is not None else _known(path, module)
    return [(path or "model", type(module).__name__, value)]


def _runs(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether a module is of one of these kinds, and its forward is that kind's own."""
    forward = getattr(module.forward, "__func__", None)
    return any(isinstance(module, kind) and forward is kind.forward for kind in kinds)


def _known(path: str, module: Any) -> float:
    """Return the built-in bound of a module; raise TypeError if there is none."""
    if _runs(module, nn.Linear, *CONVOLUTIONS):
        return layer_bound(module).item()
    if _runs(module, *NORMS) and module.running_var is not None:
        factor = (module.running_var + module.eps).rsqrt()
        factor = factor if module.weight is None else factor * module.weight.abs()
        return factor.max().item()
    if _runs(module, nn.LeakyReLU, nn.ELU):
        slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else module.alpha
        return max(1.0, abs(slope))
    if _runs(module, *DROPOUTS):
        return 1.0  # in evaluation
    for kind, slope in SLOPES.items():
        if _runs(module, kind):
            return slope
    name = type(module).__name__
    raise TypeError(f"lipschitz_report: rules must have one for {name} at {path or 'model'!r}")
