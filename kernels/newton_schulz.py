"""Newton-Schulz polynomials on lists: matrices of one short side share the launch of each word.

In Gram form the iterated matrices have only the short side. In direct form long sides may differ
inside one launch. Either way, matrices of the same short side, dtype and form share a launch.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from orthonorm import ops
from orthonorm import orthogonalize as k1
from orthonorm.ops.scaling import split_norms
from orthonorm.ops.words import SMALL, segments, triples_of
from torch import Tensor

from . import ends, tables
from .ends import End, Extra
from .iterations import Goal, iterate
from .magnitude import magnitude
from .product import served
from .small_newton_schulz import on_chip, small_iterations


class Target(NamedTuple):
    """Destination of results: tensors, the end that writes them, and the end's extras of each."""

    out: list[Tensor]
    end: End
    extras: list[Extra]

    def part(self, indices: list[int]) -> Target:
        """Return the target of some matrices of the list."""
        return Target([self.out[i] for i in indices], self.end, [self.extras[i] for i in indices])


class Iteration(NamedTuple):
    """Arguments of `newton_schulz`, in their order."""

    coefficients: list[float]
    restarts: list[int]
    form: str = "auto"
    precision: str = "auto"
    scale: str = "frobenius"
    eps: float = 0.0
    safety: float = 1.0

    def key(self, x: Tensor) -> tuple[Any, ...] | None:
        """Return what matrices of one launch share with x; None leaves x to the definition."""
        how = k1.choose(x, triples_of(self.coefficients), self.restarts, self.form, self.precision)
        if self.scale != "frobenius" or x.numel() == 0 or x.dtype == torch.float64:
            return None
        if how.small and max(x.shape[-2:]) <= SMALL:  # longer ones are small for CPUs only
            return (0, how.dtype, "small") if on_chip(x, how.dtype) else None
        if how.form == "gram" and how.dtype == torch.bfloat16:  # its Gram matrices must be float32
            return None
        if not served("product", how.dtype, x):
            return None
        return (min(x.shape[-2:]), how.dtype, how.form)

    def keys(self, X: list[Tensor]) -> list[tuple[Any, ...] | None]:
        """Return the key of every matrix, computed once for each shape and dtype."""
        kinds = [(x.shape, x.dtype) for x in X]
        found = {kind: self.key(x) for kind, x in dict(zip(kinds, X, strict=True)).items()}
        return [found[kind] for kind in kinds]

    def run(self, X: list[Tensor], target: Target, norms: Tensor | None) -> list[int]:
        """Write results to the target, a launch of each word per key; return indices left out."""
        rest: list[int] = []
        for key, indices in tables.grouped(zip(self.keys(X), itertools.count())).items():
            if key is None:
                rest = indices
                continue
            some, goal, sizes = X, target, norms
            if len(indices) < len(X):
                some, goal = [X[i] for i in indices], target.part(indices)
                sizes = norms_of(X, norms, indices)
            _, dtype, form = key
            if form == "small":
                scaling = (True, self.eps, self.safety, sizes)
                small_iterations(some, *goal, self.coefficients, dtype, *scaling)
            else:
                self.words(some, goal, dtype, form, sizes)
        return rest

    def words(
        self, X: list[Tensor], target: Target, dtype: torch.dtype, form: str, norms: Tensor | None
    ) -> None:
        """Write results of matrices of one key, word by word."""
        norms = magnitude(X) if norms is None else norms.to(torch.float64)
        placed = [
            (x, out, extra)
            for *tensors, extra in zip(X, target.out, target.extras, strict=True)
            for x, out in tables.views(*tensors)
        ]
        places, out, extras = zip(*placed, strict=True)
        triples = triples_of(self.coefficients)
        parts = segments(triples, self.restarts) if form == "gram" else None
        goal, divisors = Goal(out, target.end, extras), self.safety * norms.clamp(min=self.eps)
        iterate(places, goal, divisors, dtype, triples, parts, X[0].device)

    def rest(self, X: list[Tensor], indices: list[int], norms: Tensor | None) -> list[Tensor]:
        """Return results of the definition, for some matrices of the list."""
        sizes = norms_of(X, norms, indices)
        return ops.newton_schulz.definition([X[i] for i in indices], *self, sizes)


def norms_of(X: list[Tensor], norms: Tensor | None, indices: list[int]) -> Tensor | None:
    """Return the norms of some matrices of a list, or None without norms."""
    parts = split_norms(X, norms)
    return None if norms is None else torch.cat([parts[i].reshape(-1) for i in indices])


def newton_schulz(
    X: list[Tensor],
    coefficients: list[float],
    restarts: list[int],
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> list[Tensor]:
    """Compute matrices that the words serve together, and all others by the definition."""
    iteration = Iteration(coefficients, restarts, form, precision, scale, eps, safety)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in X]
    left = iteration.run(X, Target(out, ends.STORE, [ends.PLAIN] * len(X)), norms)
    if left:
        for i, y in zip(left, iteration.rest(X, left, norms), strict=True):
            out[i] = y
    return out


def newton_schulz_(X: list[Tensor], *how: Any, **more: Any) -> None:
    torch._foreach_copy_(X, newton_schulz(X, *how, **more))
