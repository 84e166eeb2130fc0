"""Elementwise passes over lists of tensors: one launch per set of dtypes, and shared arithmetic.

An entry's fields: first tile, tiles of a matrix, elements of a matrix, columns, number of its first
matrix in the list, number of its item in the list, matrices of the launch before. Then follow 4
fields per tensor (`tables.View`), then extras.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .configs import FUSION

HEAD = tl.constexpr(7)
MATRICES = tl.constexpr(6)
OPTIONS = dict(num_warps=8, **FUSION)


def block_of(device: torch.device) -> int:
    """Return elements per program; few in the interpreter, to cut small matrices into tiles too."""
    return 1024 if device.type == "cpu" else 4096


@triton.jit
def place(entries, count, STEPS: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's entry, matrix, first element, offsets from there, and their mask."""
    tile = tl.program_id(0).to(tl.int64)
    entry = tiles.locate(entries, count, tile, STEPS)
    size = tiles.field(entries, count, entry, 1)
    inside = tile - tiles.field(entries, count, entry, 0)
    start = inside % size * BLOCK
    left = tiles.field(entries, count, entry, 2) - start
    if FLAT:
        left = tl.multiple_of(left, 8)
    local = tl.arange(0, BLOCK)
    return entry, inside // size, start, local, local < left


@triton.jit
def elements(
    entries, count, entry, batch, start, local, k: tl.constexpr, TYPE: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Return addresses of these elements in tensor k."""
    address = tiles.field(entries, count, entry, HEAD + 4 * k).to(tl.pointer_type(TYPE))
    skip = tiles.field(entries, count, entry, HEAD + 4 * k + 1)
    if FLAT:  # stated of the sum: Triton 3.6 forgets what it is told of a cast
        address = tl.multiple_of(address + (batch * skip + start), 16)
        return address + local
    else:
        columns = tiles.field(entries, count, entry, 3)
        row = tiles.field(entries, count, entry, HEAD + 4 * k + 2)
        column = tiles.field(entries, count, entry, HEAD + 4 * k + 3)
        # GPUs divide 64-bit integers by a subroutine: once a program. Elements divide in 32 bits,
        # as if no row were longer than a program, which then begins one row at most
        first = start % columns
        address += batch * skip + start // columns * row
        short = tl.minimum(columns, local.shape[0]).to(tl.int32)
        before = short - tl.minimum(columns - first, local.shape[0]).to(tl.int32)
        index = before + local
        down = index // short
        address += tl.where(down == 0, (first - before) * column, 0)
        return address + (down * row + index % short * column)


@triton.jit
def divide(x, y):
    """Return x / y rounded to nearest, in float32 or float64."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x):
    """Return sqrt(x) rounded to nearest, in float32 or float64."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def adam(out_at, m_at, v_at, x, mask, numbers, WIDE: tl.constexpr, scale=None):
    """Update the averages m of x and v of x^2, and write out <- scale m / (sqrt(v) + eps).

    Numbers: beta1, 1 - beta1, beta2, 1 - beta2, eps.
    """
    m = tl.load(m_at, mask=mask, other=0.0).to(WIDE)
    m = tiles.number(numbers, 0).to(WIDE) * m + tiles.number(numbers, 1).to(WIDE) * x
    tl.store(m_at, m.to(m_at.dtype.element_ty), mask=mask)
    v = tl.load(v_at, mask=mask, other=0.0).to(WIDE)
    v = tiles.number(numbers, 2).to(WIDE) * v + tiles.number(numbers, 3).to(WIDE) * x * x
    tl.store(v_at, v.to(v_at.dtype.element_ty), mask=mask)
    denominator = root(v) + tiles.number(numbers, 4).to(WIDE)
    out = tl.where(denominator == 0, 0.0, divide(m, denominator))
    if scale is not None:
        out = out * scale
    tl.store(out_at, out.to(out_at.dtype.element_ty), mask=mask)


@triton.jit
def kept(found_inf, old, new):
    """Return `new`, or `old` if `found_inf` is not 0."""
    if found_inf is None:
        return new
    else:
        return tl.where(tl.load(found_inf) != 0, old, new)


@triton.jit
def unscaled(g, grad_scale):
    """Return g / grad_scale, computed as in ops/passes.py."""
    if grad_scale is None:
        return g
    else:
        return g * (1.0 / tl.load(grad_scale).to(tl.float64)).to(g.dtype)


class Group(NamedTuple):
    """Entries of one launch, and what they have in common."""

    types: tuple[Any, ...]  # of the tensors
    wide: Any  # the dtype of arithmetic
    flat: bool
    block: int
    entries: tables.Entries

    def table(self, numbers: Sequence[float], device: torch.device) -> tables.Table:
        return self.entries.table(numbers, device)

    @property
    def constants(self) -> tuple[Any, ...]:
        """The constants that every kernel takes after STEPS."""
        return (*self.types, self.wide, self.flat, self.block)


def groups(
    lists: Sequence[Sequence[Tensor]], extras: Sequence[tables.Entry] = (), most: int = 4096
) -> list[Group]:
    """Return launches of the items (one tensor of each list), by dtypes and by `flat`.

    `flat` items have matrices of a multiple of 8 elements, dense, aligned and of the same order.

    `extras` are further int64 fields of each item, and `most` is the most elements of a program.
    """
    if not lists[0]:
        return []
    block = min(most, block_of(lists[0][0].device))
    return groups_of(tables.items(*lists), tuple(extras), block)


@tables.kept
def groups_of(
    items: tuple[tables.Item, ...], extras: tuple[tables.Entry, ...], block: int
) -> list[Group]:
    keyed = []
    first = 0
    for number, item in enumerate(items):
        if isinstance(item, int):
            first += item
            continue
        for views in item:
            x = views[0]
            numel = x.rows * x.columns
            flat = numel % 8 == 0 and len({v.order for v in views}) == 1
            flat = flat and all(v.dense and v.regular for v in views)
            size = tables.cdiv(numel, block)
            extra = extras[number] if extras else ()
            fields = (f for v in views for f in v.fields)
            head = (x.batch * size, size, numel, x.columns, first, number, x.batch)
            entry = (*head, *fields, *extra)
            keyed.append(((tuple(v.dtype for v in views), flat), entry))
            first += x.batch
    made = []
    for (dtypes, flat), entries in tables.grouped(keyed).items():
        wide = tl.float64 if torch.float64 in dtypes else tl.float32
        types = tuple(tables.TYPES[d] for d in dtypes)
        made.append(Group(types, wide, flat, block, tables.Entries(entries, MATRICES.value)))
    return made
