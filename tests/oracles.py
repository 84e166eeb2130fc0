"""What the NumPy transcriptions of the optimizers share: float64, one rule per weight and step.

A rule is a function (W, G, s, t) -> W of weight, gradient, its own state (a dict) and the step
t = 1, 2, ...; it is written from the papers and the authors' code, with exact linear algebra of
NumPy alone, and knows nothing of the package under test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
State = dict[str, Any]

KELLER = ((3.4445, -4.7750, 2.0315),) * 5


def newton_schulz(X: Array, triples: Any = KELLER, safety: float = 1.0) -> Array:
    """X / |X|_F, then X <- a X + (b A + c A^2) X, A = X X^T, on the short side."""
    norm = np.sqrt((X * X).sum())
    if norm == 0:
        return X
    tall = X.shape[0] > X.shape[1]
    X = (X.T if tall else X) / (norm * safety)
    for a, b, c in triples:
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.T if tall else X


def momentum(G: Array, s: State, mu: float, nesterov: bool, heavy_ball: bool = False) -> Array:
    """B <- mu B + (1-mu) G and what comes of it; heavy ball has G for (1-mu) G."""
    new = G if heavy_ball else (1 - mu) * G
    s["B"] = mu * s.get("B", np.zeros_like(G)) + new
    return mu * s["B"] + new if nesterov else s["B"]


class Oracle:
    """A rule applied to every parameter, as a torch optimizer would be."""

    def __init__(self, params: list[Tensor], rule: Callable[..., Array], **kwargs: Any) -> None:
        self.params, self.rule, self.kwargs = params, rule, kwargs
        self.state: list[State] = [{} for _ in params]
        self.t = 0

    def step(self) -> None:
        self.t += 1
        for p, s in zip(self.params, self.state, strict=True):
            W, G = p.detach().numpy(), p.grad.numpy()  # type: ignore[union-attr]
            new = self.rule(W.copy(), G, s, self.t, **self.kwargs)
            with torch.no_grad():
                p.copy_(torch.from_numpy(np.ascontiguousarray(new)))


def oracle(rule: Callable[..., Array], **kwargs: Any) -> Callable[[list[Tensor]], Oracle]:
    return functools.partial(Oracle, rule=rule, **kwargs)
