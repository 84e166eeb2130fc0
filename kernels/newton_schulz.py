"""Whole polynomials on lists: one launch of each word for all matrices with one short side.

In Gram form what iterates has only the short side, in direct form the long sides differ inside one
launch; either way a launch is shared by every matrix that has its short side, dtype and form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from orthonorm import ops
from orthonorm import orthogonalize as k1
from orthonorm.ops.newton_schulz import split_norms
from orthonorm.ops.words import Triples, segments, triples_of, wide
from torch import Tensor

from . import tables
from .divide_each import divide_list
from .magnitude import magnitude
from .product import Factors, product, served
from .symmetric_update import symmetric_update


class Stack(NamedTuple):
    """The words on a list of wide matrices; their Gram matrices are one stack."""

    out: list[Tensor]  # results, wide

    def parts(self, A: Tensor, X: list[Tensor]) -> list[Tensor]:
        """The stack cut like the list."""
        batches = [x.shape[:-2] for x in X]
        pieces = A.split([math.prod(b) for b in batches])
        return [p.view(*b, *A.shape[1:]) for p, b in zip(pieces, batches, strict=True)]

    def gram(self, X: list[Tensor]) -> Tensor:
        n = X[0].shape[-2]
        out = X[0].new_empty(sum(math.prod(x.shape[:-2]) for x in X), n, n)
        pairs = zip(X, self.parts(out, X), strict=True)
        views = [v for x, o in pairs for v in tables.views(x, o)]
        products = [Factors(x, x.mT, o, o) for x, o in views]
        product("symmetric", products, out.device, out.dtype, symmetric=True)
        return out

    def apply(
        self, X: list[Tensor], B: Tensor, a: float, b: float = 1.0, last: bool = False
    ) -> list[Tensor]:
        """a X + b B X; the last one into the results, in their layout and dtype."""
        contiguous = torch.contiguous_format
        out = self.out if last else [torch.empty_like(x, memory_format=contiguous) for x in X]
        triples = zip(X, self.parts(B, X), out, strict=True)
        views = [v for x, left, o in triples for v in tables.views(x, left, o)]
        products = [Factors(left, x, x, o) for x, left, o in views]
        product("product", products, B.device, B.dtype, b, a)
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
    triples = triples_of(coefficients)
    keys = []
    for x in X:
        choice = k1.choose(x, triples, restarts, form, precision)
        mine = scale == "frobenius" and x.numel() > 0 and not choice.small
        mine = mine and served("product", x.device, x.dtype, choice.dtype)
        keys.append((min(x.shape[-2:]), choice.dtype, choice.form) if mine else None)
    out: list[Tensor] = list(X)
    parts = split_norms(X, norms)
    for key, rows in tables.grouped(zip(keys, range(len(X)), strict=True)).items():
        some = [X[i] for i in rows]
        sizes = None if norms is None else torch.cat([parts[i].reshape(-1) for i in rows])
        if key is None:
            arguments = (some, coefficients, restarts, form, precision, scale, eps, safety, sizes)
            done = ops.newton_schulz.definition(*arguments)
        else:
            _, dtype, shape = key
            sizes = magnitude(some) if sizes is None else sizes.to(torch.float64)
            scaled = divide_list(some, safety * sizes.clamp(min=eps), dtype)
            done = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in some]
            stack = Stack([wide(y) for y in done])
            Y = [wide(y) for y in scaled]
            if shape == "gram":
                stack.gram_form(Y, segments(triples, restarts))
            else:
                stack.direct(Y, triples)
        for i, y in zip(rows, done, strict=True):
            out[i] = y
    return out
