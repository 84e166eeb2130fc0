"""Ends of products: what a kernel does with each tile of a product, while it has it in registers.

An end stores the tile, or makes an optimizer's step of it. It is a Triton function that kernels
take as a constant. It has NUMBERS numbers, which follow the kernel's own, and two tensors of its
choice, `first` and `second`. (i, j) is the tile's corner. Fields EXTRA - 3 and EXTRA - 2 of an
entry are rows and columns of the result; EXTRA and EXTRA + 1 are the end's. Arithmetic is float32,
rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import tables, tiles
from .rounding import rounded

NUMBERS = tl.constexpr(5)
GRAIN = tl.constexpr(32)  # no two tiles of a launch begin in the same GRAIN places of a line


@triton.jit
def store(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """Write out <- value."""
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def update(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """Write out <- kept out - step value, unless an infinity was found.

    With left = 1 - first[0] decay and numbers n: kept is left if n0 is 1, first[0] if it is 0;
    step, by n1, is one of these times factor and second[item]. n2 is the address of found_inf or 0,
    n3 that of decay (float64) or 0. Without an address, `first` or `second`, found_inf, decay and
    first[0] are 0, second[item] 1. factor and item are the entry's extras. If `second` is a seed
    (int64), bfloat16 is rounded by it instead; item is then the address of the weight's first
    element.
    """
    rate = 0.0
    if first is not None:
        rate = tl.load(first).to(tl.float64)
    # volatile, so that they are read here: read before all tiles, they cost registers (sm_100)
    decay = tl.load(numbers + 3, volatile=True)
    decay_at = decay.to(tl.pointer_type(tl.float64))
    left = 1.0 - rate * tl.load(decay_at, mask=decay != 0, other=0.0, volatile=True)
    kept = tl.where(tiles.number(numbers, 0) != 0, left, rate).to(tl.float32)
    step = tl.where(tiles.number(numbers, 1) != 0, left, rate)
    step *= tiles.field(entries, count, entry, EXTRA).to(tl.float64, bitcast=True)
    item = tiles.field(entries, count, entry, EXTRA + 1)
    SEEDED: tl.constexpr = second is not None and second.dtype.element_ty == tl.int64
    if second is not None and not SEEDED:
        step *= tl.load(second + item).to(tl.float64)
    flag = tl.load(numbers + 2, volatile=True)
    found = tl.load(flag.to(tl.pointer_type(tl.float32)), mask=flag != 0, other=0.0)
    new = kept * tl.load(at, mask=mask, other=0.0).to(tl.float32) - step.to(tl.float32) * value
    TYPE: tl.constexpr = at.dtype.element_ty
    if SEEDED:
        new = rounded(new, at, item, second, TYPE)
    tl.store(at, new.to(TYPE), mask=tl.where(found == 0, mask, False))


@triton.jit
def store_squares(
    at, value, mask, entries, count, entry, EXTRA: tl.constexpr, sums, batch, i, j,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Write out <- value, and sums of the tile's squares along AXIS to `sums`.

    The sums of a matrix are (slots, lines), from the entry's item on. A slot stands for GRAIN
    places of a line. A tile writes the first of the slots that it covers, and no other.
    """
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)
    rows = tiles.field(entries, count, entry, EXTRA - 3)
    columns = tiles.field(entries, count, entry, EXTRA - 2)
    if AXIS == 1:
        line, lines, place, length = i, rows, j, columns
    else:
        line, lines, place, length = j, columns, i, rows
    total = tl.sum(value * value, axis=AXIS)
    slot = batch * tl.cdiv(length, GRAIN) + place // GRAIN
    own = sums + tiles.field(entries, count, entry, EXTRA + 1) + slot * lines + line
    local = tl.arange(0, total.shape[0])
    tl.store(own + local, total, mask=local < lines - line)


@triton.jit
def row_squares(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """Write out <- value, and sums of its squares along rows to `first`."""
    store_squares(at, value, mask, entries, count, entry, EXTRA, first, batch, i, j, 1)


@triton.jit
def column_squares(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """Write out <- value, and sums of its squares along columns to `first`."""
    store_squares(at, value, mask, entries, count, entry, EXTRA, first, batch, i, j, 0)


OF_TILES = (row_squares, column_squares)  # sums depend on the tile: it must not on company


@triton.jit
def adam(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """Update the averages C of value and D of value^2, and write out <- C / (sqrt(D) + eps)."""
    each.adam(at, c_at, d_at, value, mask, numbers, tl.float32)


class End(NamedTuple):
    """An end, with its numbers and tensors."""

    function: Any
    numbers: tuple[float, ...] = ()
    first: Tensor | None = None
    second: Tensor | None = None
    turned: Any = None  # another function for matrices that are iterated as transposes, if any

    def facing(self, turned: bool) -> End:
        """Return the end for matrices that are iterated as transposes, if `turned`."""
        return self._replace(function=self.turned) if turned and self.turned else self

    @property
    def rounds(self) -> bool:
        """True if `second` is a seed of stochastic rounding."""
        return self.second is not None and self.second.dtype == torch.int64

    @property
    def padded(self) -> tuple[float, ...]:
        """The numbers, with zeros up to NUMBERS."""
        return (*self.numbers, *(0.0,) * (NUMBERS.value - len(self.numbers)))


STORE = End(store)
Extra = tuple[int, int]  # factor as bits, item
PLAIN: Extra = (tables.bits(1.0), 0)


def addresses(*tensors: Tensor | None) -> tuple[float, ...]:
    """Return addresses, 0 for None, as numbers of an end; the caller keeps the tensors alive."""
    return tuple(tables.number(0 if t is None else t.data_ptr()) for t in tensors)


def muon(
    lr: Tensor, weight_decay: Tensor, seed: Tensor | None = None, found_inf: Tensor | None = None
) -> End:
    """Return the end W <- (1 - lr weight_decay) W - lr factor value, of float64 decay.

    It writes nothing if `found_inf` (float32) is not 0. With a seed, bfloat16 weights are rounded
    stochastically; items are then addresses of the weights' first elements.
    """
    return End(update, (1.0, 0.0, *addresses(found_inf, weight_decay)), lr, seed)


def squares(sums: Tensor) -> End:
    """Return the end that stores values, and sums of squares of rows: (slots, lines), float32."""
    return End(row_squares, first=sums, turned=column_squares)


def slots(length: int) -> int:
    """Return how many sums a line of this length has."""
    return tables.cdiv(length, GRAIN.value)


def conda(lr: Tensor, weight_decay: Tensor, scales: Tensor) -> End:
    """Return the end W <- (1 - lr weight_decay) (W - scales[item] value), of float64 decay."""
    return End(update, (1.0, 1.0, *addresses(None, weight_decay)), lr, scales)


def decayed(decay: Tensor | None) -> End:
    """Return the end W <- decay W - value; without decay, W <- W - value."""
    return End(update, (1.0 if decay is None else 0.0, 1.0), decay)


def moments(beta1: float, beta2: float, eps: float) -> End:
    """Return the end `rotated_adam_` without scales; C and D are its averages."""
    return End(adam, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
