"""Whole polynomials on lists: one launch of each word for all matrices with one short side.

In Gram form what iterates has only the short side, in direct form the long sides differ inside one
launch; either way a launch is shared by every matrix that has its short side, dtype and form.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from orthonorm import ops
from orthonorm import orthogonalize as k1
from orthonorm.ops.newton_schulz import split_norms
from orthonorm.ops.words import SMALL, Triples, segments, triples_of, wide
from torch import Tensor

from . import ends, tables
from .divide_each import divide_list
from .ends import End, Extra
from .gram import grams
from .magnitude import magnitude
from .product import plain, product, served
from .small_newton_schulz import HALF, on_chip, small_iterations
from .symmetric_update import symmetric_update


class Target(NamedTuple):
    """Where results go: tensors, and how the last product ends there, by the extras of each."""

    out: list[Tensor]
    end: End
    extras: list[Extra]

    def part(self, rows: list[int]) -> Target:
        """Of these matrices of the list."""
        return Target([self.out[i] for i in rows], self.end, [self.extras[i] for i in rows])


class Stack(NamedTuple):
    """The words on a list of wide matrices; their Gram matrices are one stack."""

    target: Target

    def parts(self, A: Tensor, X: list[Tensor]) -> list[Tensor]:
        """The stack cut like the list."""
        batches = [x.shape[:-2] for x in X]
        pieces = A.split([math.prod(b) for b in batches])
        return [p.view(*b, *A.shape[1:]) for p, b in zip(pieces, batches, strict=True)]

    def gram(self, X: list[Tensor]) -> Tensor:
        n = X[0].shape[-2]
        out = X[0].new_empty(sum(math.prod(x.shape[:-2]) for x in X), n, n)
        grams(X, self.parts(out, X))
        return out

    def apply(
        self, X: list[Tensor], B: Tensor, a: float, b: float = 1.0, last: bool = False
    ) -> list[Tensor]:
        """a X + b B X; the last one to the target."""
        if last:
            out, end, extras = self.target
        else:
            out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in X]
            end, extras = ends.STORE, [ends.PLAIN] * len(X)
        rows = zip(X, self.parts(B, X), map(wide, out), extras, strict=True)
        facing = (end.facing(o.shape[-2] > o.shape[-1]) for o in out)
        for how, some in tables.grouped(zip(facing, rows, strict=True)).items():
            products = [
                plain(left, x, x, o, extra)
                for *tensors, extra in some
                for x, left, o in tables.views(*tensors)
            ]
            product("product", products, B.device, B.dtype, b, a, how)
        return out

    def direct(self, X: list[Tensor], triples: Triples) -> None:
        """The iterations of `direct_polynomial`."""
        for t, (a, b, c) in enumerate(triples):
            A, last = self.gram(X), t + 1 == len(triples)
            if c == 0:
                X = self.apply(X, A, a, b, last)
            else:
                X = self.apply(X, symmetric_update(A, A, A, c, b), a, 1.0, last)

    def gram_form(self, X: list[Tensor], parts: list[Triples]) -> None:
        """The iterations of `gram_form`, in the dtype of X."""
        for i, segment in enumerate(parts):
            Q = ops.gram_polynomial(self.gram(X), [c for t in segment for c in t])
            X = self.apply(X, Q, 0.0, 1.0, i + 1 == len(parts))


class Iteration(NamedTuple):
    """What `newton_schulz` is asked for; its arguments in their order."""

    coefficients: list[float]
    restarts: list[int]
    form: str = "auto"
    precision: str = "auto"
    scale: str = "frobenius"
    eps: float = 0.0
    safety: float = 1.0

    def key(self, x: Tensor) -> tuple[Any, ...] | None:
        """What the matrices of one launch have in common; None leaves x to the definition."""
        how = k1.choose(x, triples_of(self.coefficients), self.restarts, self.form, self.precision)
        if self.scale != "frobenius" or x.numel() == 0 or x.dtype == torch.float64:
            return None
        if how.small and max(x.shape[-2:]) <= SMALL:  # longer ones are for a core's cache
            return (0, how.dtype, "small") if how.dtype in HALF and on_chip(x) else None
        if how.form == "gram" and how.dtype == torch.bfloat16:  # its chain is in float32
            return None
        if not served("product", how.dtype, x):
            return None
        return (min(x.shape[-2:]), how.dtype, how.form)

    def run(self, X: list[Tensor], target: Target, norms: Tensor | None) -> list[int]:
        """Results to the target, a launch of each word for every key; returns whom that left."""
        parts = split_norms(X, norms)
        rest: list[int] = []
        for key, rows in tables.grouped((self.key(x), i) for i, x in enumerate(X)).items():
            if key is None:
                rest = rows
                continue
            some, goal = [X[i] for i in rows], target.part(rows)
            sizes = None if norms is None else torch.cat([parts[i].reshape(-1) for i in rows])
            _, dtype, form = key
            if form == "small":
                scaling = (True, self.eps, self.safety, sizes)
                small_iterations(some, *goal, self.coefficients, dtype, *scaling)
            else:
                self.words(some, Stack(goal), dtype, form, sizes)
        return rest

    def words(
        self, X: list[Tensor], stack: Stack, dtype: torch.dtype, form: str, norms: Tensor | None
    ) -> None:
        norms = magnitude(X) if norms is None else norms.to(torch.float64)
        scaled = divide_list(X, self.safety * norms.clamp(min=self.eps), dtype)
        Y = [wide(y) for y in scaled]
        triples = triples_of(self.coefficients)
        if form == "gram":
            stack.gram_form(Y, segments(triples, self.restarts))
        else:
            stack.direct(Y, triples)

    def rest(self, X: list[Tensor], rows: list[int], norms: Tensor | None) -> list[Tensor]:
        """The definition, for some matrices of the list."""
        parts = split_norms(X, norms)
        sizes = None if norms is None else torch.cat([parts[i].reshape(-1) for i in rows])
        return ops.newton_schulz.definition([X[i] for i in rows], *self, sizes)


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
    """Matrices the words serve together, all others by the definition."""
    iteration = Iteration(coefficients, restarts, form, precision, scale, eps, safety)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in X]
    rows = iteration.run(X, Target(out, ends.STORE, [ends.PLAIN] * len(X)), norms)
    if rows:
        for i, y in zip(rows, iteration.rest(X, rows, norms), strict=True):
            out[i] = y
    return out
