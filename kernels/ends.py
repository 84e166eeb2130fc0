"""What becomes of a product's tile: it is stored, or it ends an optimizer's step where it is.

An end is a Triton function that kernels take as a constant, with its numbers (behind a kernel's
own, `NUMBERS` of them) and two tensors of its choice; (i, j) is the tile's corner. A kernel's
entries have the sides of the result just before EXTRA but one. Arithmetic is float32, rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    """out <- kept out - step value, kept = base + slope first[0].

    The step is the entry's factor, times second[the entry's item] if there is one, times kept if
    the decay comes last. Numbers: base, slope, whether it does.
    """
    kept = tiles.number(numbers, 0)
    if first is not None:
        kept += tiles.number(numbers, 1) * tl.load(first).to(tl.float64)
    step = tiles.field(entries, count, entry, EXTRA).to(tl.float64, bitcast=True)
    if second is not None:
        step *= tl.load(second + tiles.field(entries, count, entry, EXTRA + 1)).to(tl.float64)
    step = tl.where(tiles.number(numbers, 2) != 0, kept * step, step)
    new = updated(at, value, mask, kept, step)
    tl.store(at, new.to(at.dtype.element_ty), mask=mask)


@triton.jit
def updated(at, value, mask, kept, step):
    """kept out - step value."""
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return kept.to(tl.float32) * old - step.to(tl.float32) * value


@triton.jit
def rounded_update(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second,
    batch, i, j,
):  # fmt: skip
    """`update` by first[0] times the factor, rounded by the seed second[0] if out is bfloat16.

    The entry's item is the address where the weight begins.
    """
    rate = tl.load(first).to(tl.float64)
    kept = tiles.number(numbers, 0) + tiles.number(numbers, 1) * rate
    step = rate * tiles.field(entries, count, entry, EXTRA).to(tl.float64, bitcast=True)
    base = tiles.field(entries, count, entry, EXTRA + 1)
    TYPE: tl.constexpr = at.dtype.element_ty
    new = rounded(updated(at, value, mask, kept, step), at, base, second, TYPE)
    tl.store(at, new.to(TYPE), mask=mask)


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
    def one_tile(self) -> bool:
        """Whether results depend on the tile, which must not depend on company then."""
        return self.function in (row_squares, column_squares)

    @property
    def padded(self) -> tuple[float, ...]:
        return (*self.numbers, *(0.0,) * (NUMBERS.value - len(self.numbers)))


STORE = End(store)
Extra = tuple[int, int]  # factor as bits, item
PLAIN: Extra = (tables.bits(1.0), 0)


def muon(lr: Tensor, weight_decay: float) -> End:
    """W <- (1 - lr weight_decay) W - lr factor value."""
    return End(update, (1.0, -weight_decay, 0.0), lr, lr)


def muon_rounded(lr: Tensor, weight_decay: float, seed: Tensor) -> End:
    """`muon`, bfloat16 weights rounded stochastically; items are where weights begin."""
    return End(rounded_update, (1.0, -weight_decay), lr, seed)


def squares(sums: Tensor) -> End:
    """The value, and sums of its squares along rows: float32, lines x slots of each matrix."""
    return End(row_squares, first=sums, turned=column_squares)


def slots(length: int) -> int:
    """Sums of a line."""
    return triton.cdiv(length, GRAIN.value)


def conda(lr: Tensor, weight_decay: float, scales: Tensor) -> End:
    """W <- (1 - lr weight_decay) (W - scales[item] value)."""
    return End(update, (1.0, -weight_decay, 1.0), lr, scales)


def decayed(decay: Tensor | None) -> End:
    """W <- decay W - value."""
    return End(update, (1.0,) if decay is None else (0.0, 1.0), decay)


def moments(beta1: float, beta2: float, eps: float) -> End:
    """`rotated_adam_` without scales, C and D being the moments."""
    return End(adam, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
