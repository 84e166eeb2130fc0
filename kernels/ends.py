"""What becomes of a product's tile: it is stored, or it ends an optimizer's step where it is.

An end is a Triton function that kernels take as a constant, with its numbers (behind a kernel's
own, `NUMBERS` of them) and two tensors of its choice; (i, j) is the tile's corner. A kernel's
entries have the sides of the result just before EXTRA but one. Arithmetic is float32, rounded once.
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
GRAIN = tl.constexpr(32)  # no two tiles of a launch begin within one of these


@triton.jit
def store(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """out <- value."""
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def update(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """out <- kept out - step value, kept = base + slope first[0], where no infinity was found.

    The step is the entry's factor times (base + slope first[0]) of its own, and second[the entry's
    item], unless second is a seed (int64) by which bfloat16 is rounded: then the item is the
    address where the weight begins. Numbers: both pairs, and the address of found_inf or 0.
    """
    rate = 0.0
    if first is not None:
        rate = tl.load(first).to(tl.float64)
    kept = (tiles.number(numbers, 0) + tiles.number(numbers, 1) * rate).to(tl.float32)
    step = tiles.number(numbers, 2) + tiles.number(numbers, 3) * rate
    step *= tiles.field(entries, count, entry, EXTRA).to(tl.float64, bitcast=True)
    item = tiles.field(entries, count, entry, EXTRA + 1)
    SEEDED: tl.constexpr = second is not None and second.dtype.element_ty == tl.int64
    if second is not None and not SEEDED:
        step *= tl.load(second + item).to(tl.float64)
    # volatile, so read here: before all tiles it would take registers through them (sm_100 spilled)
    flag = tl.load(numbers + 4, volatile=True)
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
    """out <- value; the squares of the tile, added along AXIS, to the slot of its place there.

    A matrix has lines x slots of them from the entry's item on, one slot for GRAIN places; of those
    that a tile covers it fills the first.
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
    """out <- value; and the sums of its squares along rows, to first."""
    store_squares(at, value, mask, entries, count, entry, EXTRA, first, batch, i, j, 1)


@triton.jit
def column_squares(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """`row_squares` of the transpose."""
    store_squares(at, value, mask, entries, count, entry, EXTRA, first, batch, i, j, 0)


OF_TILES = (row_squares, column_squares)  # results depend on the tile: it must not on company


@triton.jit
def adam(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """out <- C / (sqrt(D) + eps), C and D the averages of the value and of its square."""
    each.adam(at, c_at, d_at, value, mask, numbers, tl.float32)


class End(NamedTuple):
    """An end and what it reads."""

    function: Any
    numbers: tuple[float, ...] = ()
    first: Tensor | None = None
    second: Tensor | None = None
    turned: Any = None  # the function where matrices are iterated as their transposes, if another

    def facing(self, turned: bool) -> End:
        return self._replace(function=self.turned) if turned and self.turned else self

    @property
    def rounds(self) -> bool:
        return self.second is not None and self.second.dtype == torch.int64

    @property
    def padded(self) -> tuple[float, ...]:
        return (*self.numbers, *(0.0,) * (NUMBERS.value - len(self.numbers)))


STORE = End(store)
Extra = tuple[int, int]  # factor as bits, item
PLAIN: Extra = (tables.bits(1.0), 0)


def muon(
    lr: Tensor, weight_decay: float, seed: Tensor | None = None, found_inf: Tensor | None = None
) -> End:
    """W <- (1 - lr weight_decay) W - lr factor value, unless `found_inf` (float32) is not 0.

    With a seed, bfloat16 weights are rounded stochastically; items are where weights begin.
    """
    flag = 0 if found_inf is None else found_inf.data_ptr()
    return End(update, (1.0, -weight_decay, 0.0, 1.0, tables.number(flag)), lr, seed)


def squares(sums: Tensor) -> End:
    """The value, and sums of its squares along rows: float32, lines x slots of each matrix."""
    return End(row_squares, first=sums, turned=column_squares)


def slots(length: int) -> int:
    """Sums of a line."""
    return tables.cdiv(length, GRAIN.value)


def conda(lr: Tensor, weight_decay: float, scales: Tensor) -> End:
    """W <- (1 - lr weight_decay) (W - scales[item] value)."""
    return End(update, (1.0, -weight_decay, 1.0, -weight_decay), lr, scales)


def decayed(decay: Tensor | None) -> End:
    """W <- decay W - value."""
    return End(update, (1.0, 0.0, 1.0) if decay is None else (0.0, 1.0, 1.0), decay)


def moments(beta1: float, beta2: float, eps: float) -> End:
    """`rotated_adam_` without scales, C and D being the moments."""
    return End(adam, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
