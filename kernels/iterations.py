"""Newton-Schulz iterations between places in memory: planned once, then only launched.

A step meets the same matrices every time, and a caching allocator gives it the same workspace. So
views, tiles and tables, which take the host time, are kept by addresses. A later step only
launches. All matrices of a call have one short side n; their Gram matrices are one stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from orthonorm import ops
from orthonorm.ops.words import Triples
from torch import Tensor

from . import configs, ends, tables
from .divide_each import divide_items
from .ends import End, Extra
from .gram import parts_size, sweep
from .gram_polynomial import Factor, alone, chained, run, symmetric
from .product import Launch, launches, plain, start
from .tables import Places, dense

GRAIN = 256  # bytes: every matrix batch, stack and sum begins at a multiple in the workspace


class Goal(NamedTuple):
    """Destination of results: places, the end that writes them, and the end's extras of each."""

    out: Places
    end: End
    extras: tuple[Extra, ...]


# ---- places --------------------------------------------------------------------------------------


def whole(size: int) -> int:
    """Return `size` rounded up to a multiple of GRAIN."""
    return tables.cdiv(size, GRAIN) * GRAIN


@tables.kept
def laid(X: Places, dtype: torch.dtype, address: int) -> Places:
    """Return dense matrices shaped like these, one after the other from an address on."""
    found = []
    for x in X:
        found.append(dense(dtype, x.batch, x.rows, x.columns, address))
        address += whole(x.batch * x.rows * x.columns * dtype.itemsize)
    return tuple(found)


@tables.kept
def cut(X: Places, dtype: torch.dtype, address: int) -> Places:
    """Return the stack of Gram matrices at an address, cut into the batches of the wide X."""
    found = []
    for x in X:
        found.append(dense(dtype, x.batch, x.rows, x.rows, address))
        address += x.batch * x.rows**2 * dtype.itemsize
    return tuple(found)


@tables.kept
def sizes(X: Places, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return the number of matrices, and bytes of: a copy of all, a stack, the sums of `sweep`."""
    count = sum(x.batch for x in X)
    copies = sum(whole(x.batch * x.rows * x.columns * dtype.itemsize) for x in X)
    stack = whole(count * min(X[0].rows, X[0].columns) ** 2 * dtype.itemsize)
    return count, copies, stack, whole(4 * parts_size(tuple(x.wide for x in X)))


class Workspace:
    """One allocation for copies of the matrices, stacks, and sums of pieces of long rows."""

    def __init__(
        self, X: Places, dtype: torch.dtype, device: torch.device, copies: int, stacks: int
    ) -> None:
        self.count, copy, stack, sums = sizes(X, dtype)
        self.dtype, self.side = dtype, min(X[0].rows, X[0].columns)
        size = copies * copy + stacks * stack + sums
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.base = address = self.memory.data_ptr()
        self.copies = tuple(range(address, address + copies * copy, copy))
        address += copies * copy
        self.stacks = tuple(range(address, address + stacks * stack, stack))
        self.sums = address + stacks * stack

    def tensor(self, address: int) -> Tensor:
        """Return the stack at an address."""
        n = self.side
        begin, size = address - self.base, self.count * n * n * self.dtype.itemsize
        return self.memory[begin : begin + size].view(self.dtype).view(self.count, n, n)


# ---- words ---------------------------------------------------------------------------------------


@tables.kept
def applied(
    X: Places, Q: Places, out: Places, extras: tuple[Extra, ...], device: torch.device,
    precision: str, function: object, rounds: bool,
) -> list[Launch]:  # fmt: skip
    """Return launches of a X + b Q X."""
    zipped = zip(X, Q, out, extras, strict=True)
    products = tuple(plain(q, x, x, o.wide, extra) for x, q, o, extra in zipped)
    return launches("product", products, device, X[0].dtype, precision, function, rounds)


@tables.kept
def facing(out: Places) -> list[tuple[bool, tuple[int, ...]]]:
    """Return (True, indices of tall results) and (False, indices of others), if there are any."""
    groups = tables.grouped((o.rows > o.columns, i) for i, o in enumerate(out))
    return [(turned, tuple(indices)) for turned, indices in groups.items()]


class Words(NamedTuple):
    """The words `gram` and `apply`, and both forms, on wide matrices, until the goal is written."""

    work: Workspace
    goal: Goal
    device: torch.device

    @property
    def precision(self) -> str:
        return configs.precision(self.work.dtype)

    def gram(self, X: Places, to: int) -> None:
        """Write the Gram matrices of X to the stack at an address."""
        sweep(X, cut(X, self.work.dtype, to), self.work.sums, self.device)

    def apply(self, X: Places, factor: Factor, to: int | None) -> Places:
        """Write (alpha Q + delta I) X to the copy at an address, or to the goal if `to` is None."""
        Q = cut(X, self.work.dtype, factor.Q)
        how, numbers = (self.device, self.precision), (factor.alpha, factor.delta)
        if to is not None:
            out = laid(X, self.work.dtype, to)
            found = applied(X, Q, out, (ends.PLAIN,) * len(X), *how, ends.store, False)
            start(found, self.device, *numbers)
            return out
        out, end, extras = self.goal
        for turned, indices in facing(out):
            some = [tuple(values[i] for i in indices) for values in (X, Q, out, extras)]
            own = end.facing(turned)
            found = applied(*some, *how, own.function, own.rounds)
            start(found, self.device, *numbers, own)
        return out

    def direct(self, X: Places, triples: Triples) -> None:
        """Make the iterations of `ops.direct_polynomial`."""
        A, Z = self.work.stacks
        sizes = (self.work.dtype, self.work.count, self.work.side, self.work.side)
        square = symmetric(*(dense(*sizes, at) for at in (A, A, A, Z)), self.device, self.precision)
        for t, (a, b, c) in enumerate(triples):
            self.gram(X, A)
            if c:
                start(square, self.device, c, b, symmetric=True)
            to = self.work.copies[(t + 1) % 2] if t + 1 < len(triples) else None
            X = self.apply(X, Factor(Z, 1.0, a) if c else Factor(A, b, a), to)

    def gram_form(self, X: Places, parts: Sequence[Triples]) -> None:
        """Make the iterations of `ops.gram_form`, in the dtype of X."""
        R = self.work.stacks[0]
        for i, segment in enumerate(parts):
            self.gram(X, R)
            to = self.work.copies[(i + 1) % 2] if i + 1 < len(parts) else None
            X = self.chain(X, R, segment, to)

    def chain(self, X: Places, R: int, triples: Triples, to: int | None) -> Places:
        """Multiply X by the polynomial of its Gram matrices, the stack at R; see `apply`."""
        if len(self.work.stacks) == 1:  # the polynomial is one launch
            polynomial = ops.gram_polynomial(self.work.tensor(R), [c for t in triples for c in t])
            return self.apply(X, Factor(polynomial.data_ptr()), to)
        sizes = (self.work.count, self.work.side, self.work.dtype)
        how = (tuple(triples), self.device, self.precision)
        steps, factor = chained(R, self.work.stacks, *sizes, *how)
        run(steps, self.device)
        return self.apply(X, factor, to)


def iterate(
    X: Places, goal: Goal, norms: Tensor, dtype: torch.dtype, triples: Triples,
    parts: Sequence[Triples] | None, device: torch.device,
) -> None:  # fmt: skip
    """Divide X by `norms`, iterate, and write the goal.

    In Gram form `parts` are the iterations between restarts; None means the direct form.
    """
    if parts is None:
        copies, stacks = min(2, len(triples)), 2
    else:
        n = min(X[0].rows, X[0].columns)
        copies, stacks = min(2, len(parts)), 1 if alone(dtype, n, device) else 4
    work = Workspace(X, dtype, device, copies, stacks)
    scaled = laid(X, dtype, work.copies[0])
    divide_items(paired(X, scaled), norms)
    words = Words(work, goal, device)
    wide = turned(scaled)
    if parts is None:
        words.direct(wide, triples)
    else:
        words.gram_form(wide, parts)


@tables.kept
def paired(X: Places, Y: Places) -> tuple[tables.Item, ...]:
    """Return items of one place of each list."""
    return tuple((pair,) for pair in zip(X, Y, strict=True))


@tables.kept
def turned(X: Places) -> Places:
    """Return every place with its short side first."""
    return tuple(x.wide for x in X)
