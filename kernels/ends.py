"""What becomes of a product's tile: it is stored, or it ends an optimizer's step where it is.

An end is a Triton function that kernels take as a constant, with its numbers (behind a kernel's
own, `NUMBERS` of them) and two tensors of its choice. Arithmetic is float32, rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import tables, tiles

NUMBERS = tl.constexpr(5)


@triton.jit
def store(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second
):  # fmt: skip
    """out <- value."""
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def update(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second
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
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    new = kept.to(tl.float32) * old - step.to(tl.float32) * value
    tl.store(at, new.to(at.dtype.element_ty), mask=mask)


@triton.jit
def adam(
    at, value, mask, c_at, d_at, numbers, entries, count, entry, EXTRA: tl.constexpr, first, second
):  # fmt: skip
    """out <- C / (sqrt(D) + eps), C and D the averages of the value and of its square."""
    each.adam(at, c_at, d_at, value, mask, numbers, tl.float32)


class End(NamedTuple):
    """An end and what it reads."""

    function: Any
    numbers: tuple[float, ...] = ()
    first: Tensor | None = None
    second: Tensor | None = None

    @property
    def padded(self) -> tuple[float, ...]:
        return (*self.numbers, *(0.0,) * (NUMBERS.value - len(self.numbers)))


STORE = End(store)
Extra = tuple[int, int]  # factor as bits, item
PLAIN: Extra = (tables.bits(1.0), 0)


def muon(lr: Tensor, weight_decay: float) -> End:
    """W <- (1 - lr weight_decay) W - lr factor value."""
    return End(update, (1.0, -weight_decay, 0.0), lr, lr)


def conda(lr: Tensor, weight_decay: float, scales: Tensor) -> End:
    """W <- (1 - lr weight_decay) (W - scales[item] value)."""
    return End(update, (1.0, -weight_decay, 1.0), lr, scales)


def decayed(decay: Tensor | None) -> End:
    """W <- decay W - value."""
    return End(update, (1.0,) if decay is None else (0.0, 1.0), decay)


def moments(beta1: float, beta2: float, eps: float) -> End:
    """`rotated_adam_` without scales, C and D being the moments."""
    return End(adam, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
