"""8-bit codes and scales of a list of matrices, in one pass; a program has several blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from orthonorm import ops
from orthonorm.ops.blocks import BLOCK as SIZE
from orthonorm.ops.blocks import table_of
from torch import Tensor

from . import elementwise as each
from . import tables, tiles

GRAIN = tl.constexpr(SIZE)
UPPER = tl.constexpr(0x3F80)  # the upper 16 bits of 1.0
NO_EDGE = tl.constexpr(0x1FFFF)


@functools.cache
def intervals_of(signed: bool, device: torch.device) -> Tensor:
    """Return the intervals of `encoded`, kept as `table_of` keeps values.

    The upper 16 bits of |y| leave it an interval with at most one midpoint of values. Its number is
    that of the midpoints from 0 to below the interval, times 2^17, plus the lower 16 bits of its
    midpoint, or NO_EDGE. Without signs 0 counts as one: what is positive has a code above 0.
    """
    values = table_of(signed, torch.device("cpu"))
    edges = ((values[1:] + values[:-1]) / 2)[127 if signed else 1 :].view(torch.int32)
    below = torch.searchsorted(edges >> 16, torch.arange(UPPER.value + 1, dtype=torch.int32))
    found = (below + (not signed)) << 17 | NO_EDGE.value
    found[edges >> 16] += (edges & 0xFFFF) - NO_EDGE.value
    return found.to(device, torch.int32)


@triton.jit
def scales_at(
    entries, count, entry, batch, start, k: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Return addresses of the scales (tensor k) of this program's blocks, and their mask."""
    address = tiles.field(entries, count, entry, each.HEAD + 4 * k).to(tl.pointer_type(TYPE))
    skip = tiles.field(entries, count, entry, each.HEAD + 4 * k + 1)
    column = tiles.field(entries, count, entry, each.HEAD + 4 * k + 3)
    first = tl.arange(0, BLOCK // GRAIN)
    mask = first * GRAIN < tiles.field(entries, count, entry, 2) - start
    return address + batch * skip + (start // GRAIN + first) * column, mask


@triton.jit
def encoded(x, intervals, SIGNED: tl.constexpr):
    """Return the codes of x, a block in each row, as int32, and the blocks' scales.

    A code is the number of midpoints below x / scale, or 255 for NaN. Values are symmetric around 0
    but for the last, 1, so that midpoints below -y are those above y.
    """
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as |x|, with NaN above all
    scale = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    y = tl.where((scale == 0)[:, None], 0.0, tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    sign = bits >> 31  # -1 or 0
    interval = tl.load(intervals + tl.minimum(size >> 16, UPPER))
    # on a midpoint the lower code: of a negative number the one away from 0
    past = (interval & NO_EDGE) - (size & 0xFFFF) + sign
    below = tl.where(size == 0, 0, (interval >> 17) - (past >> 31))
    zero = 127 if SIGNED else 0
    code = tl.maximum(zero + ((below ^ sign) - sign), 0)
    return tl.where(size > 0x7F800000, 255, code), scale


@triton.jit
def decoded(code, scale, values):
    """Return what int32 codes stand for, a block in each row."""
    value = tl.reshape(tl.load(values + code), (scale.shape[0], GRAIN))
    return value * scale[:, None]


@triton.jit(do_not_specialize=["count"])
def quantize_kernel(
    table, count, intervals, STEPS: tl.constexpr, X_TYPE: tl.constexpr, CODES_TYPE: tl.constexpr,
    SCALES_TYPE: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Write scales and codes."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    code, scale = encoded(tl.reshape(x, (BLOCK // GRAIN, GRAIN)), intervals, SIGNED)
    codes_at = each.elements(table, count, entry, batch, start, local, 1, CODES_TYPE, FLAT)
    tl.store(codes_at, tl.reshape(code, (BLOCK,)).to(CODES_TYPE), mask=mask)
    at, inside = scales_at(table, count, entry, batch, start, 2, SCALES_TYPE, BLOCK)
    tl.store(at, scale.to(SCALES_TYPE), mask=inside)


def coded(
    tensors: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[Tensor]],
    extras: Sequence[tables.Entry] = (),
    most: int = 4096,
) -> list[each.Group]:
    """Return launches (`each.groups`) over lists of matrices or codes, and lists of their scales.

    Blocks are cut row by row. So a launch may take elements in the order of memory only if every
    matrix of the lists lies row by row.
    """
    lists = (*tensors, *([s.unsqueeze(-2) for s in values] for values in scales))
    items = [item for item in tables.items(*lists) if not isinstance(item, int)]
    by_rows = all(v.order == 1 for item in items for views in item for v in views)
    return [
        group._replace(flat=group.flat and by_rows) for group in each.groups(lists, extras, most)
    ]


def quantize_blocks_(
    codes: list[Tensor], scales: list[Tensor], X: list[Tensor], signed: bool = True
) -> None:
    if not X or any(t.dtype == torch.float64 for t in (*X, *scales)):
        return ops.quantize_blocks_.definition(codes, scales, X, signed)
    intervals = intervals_of(signed, X[0].device)
    for group in coded((X, codes), (scales,)):
        table = group.table((), X[0].device)
        quantize_kernel[(table.tiles,)](
            table.data, table.count, intervals, table.steps, *group.constants, signed,
            **each.OPTIONS,
        )  # fmt: skip
