"""Comparison of the top singular values of every layer across widths of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .. import _checks as check
from .norms import sigma_1


class WidthMatch(NamedTuple):
    """Result for a layer: sigma_1 by width, largest over smallest, and the fitted exponent p."""

    sigma: dict[int, float]
    spread: float
    exponent: float


def match_widths(
    weights: Mapping[int, Mapping[str, Tensor]], steps: int = 32
) -> dict[str, WidthMatch]:
    """sigma_1(W_l) for every layer l and width d, and p of the fit sigma_1 ~ d^p.

    Hyperparameters that transfer to larger widths keep the top singular value of each layer the
    same (p = 0). With learning rate eta and weight decay lambda it grows as
    sqrt(eta / lambda) d^0.75. The rule is therefore eta ~ 1 / d and lambda ~ sqrt(d).

    Args:
        weights: {width: {layer: matrix (m, n)}} of models trained alike, such as
            `{d: dict(model.named_parameters()) ...}`. Tensors that are not 2-D, and layers that
            some width lacks, are left out.
        steps: power steps for matrices too large for an SVD.

    Returns: {layer: (sigma by width, max / min, p by least squares of the logarithms)}. Cost: a
    `sigma_1` of every matrix.

    Source: arXiv:2510.15262.
    """
    name = "match_widths"
    if not isinstance(weights, Mapping) or len(weights) < 2:
        raise ValueError(f"{name}: weights must map two or more widths to layers, got {weights!r}")
    for width in weights:
        check.integer(name, "width", width, 1)
    widths = sorted(weights)
    shared = [
        layer
        for layer, W in weights[widths[0]].items()
        if W.dim() == 2 and all(layer in weights[d] for d in widths)
    ]
    out = {}
    for layer in shared:
        sigma = {d: float(sigma_1(weights[d][layer], steps)) for d in widths}
        smallest = min(sigma.values())
        spread = max(sigma.values()) / smallest if smallest > 0 else math.inf
        out[layer] = WidthMatch(sigma, spread, _exponent(sigma))
    return out


def _exponent(sigma: Mapping[int, float]) -> float:
    """Return the slope of log sigma over log width; NaN if a sigma is zero."""
    if min(sigma.values()) <= 0:
        return math.nan
    x, y = [math.log(d) for d in sigma], [math.log(s) for s in sigma.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - mean_x) ** 2 for a in x)
