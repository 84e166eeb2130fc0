"""8-bit codes and scales of a list of matrices, in one pass; a program has several blocks."""

from __future__ import annotations

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


@triton.jit
def scales_at(entries, count, entry, batch, start, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return addresses of the scales (third tensor) of this program's blocks, and their mask."""
    address = tiles.field(entries, count, entry, each.HEAD + 8).to(tl.pointer_type(TYPE))
    skip = tiles.field(entries, count, entry, each.HEAD + 9)
    column = tiles.field(entries, count, entry, each.HEAD + 11)
    first = tl.arange(0, BLOCK // GRAIN)
    mask = first * GRAIN < tiles.field(entries, count, entry, 2) - start
    return address + batch * skip + (start // GRAIN + first) * column, mask


@triton.jit(do_not_specialize=["count"])
def quantize_kernel(
    table, count, edges, STEPS: tl.constexpr, X_TYPE: tl.constexpr, CODES_TYPE: tl.constexpr,
    SCALES_TYPE: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Write scales, and codes: the number of edges below x / scale, or 255 for NaN.

    Bisection finds the number of edges.
    """
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK // GRAIN, GRAIN))
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as |x|, with NaN above all
    scale = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    y = tl.where((scale == 0)[:, None], 0.0, tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    code = tl.zeros(y.shape, dtype=tl.int32)
    for step in tl.static_range(8):
        probe = code + (128 >> step)
        code = tl.where(y > tl.load(edges + probe - 1), probe, code)
    if not SIGNED:
        code = tl.where(y > 0, tl.maximum(code, 1), code)
    code = tl.where(y != y, 255, code)
    codes_at = each.elements(table, count, entry, batch, start, local, 1, CODES_TYPE, FLAT)
    tl.store(codes_at, tl.reshape(code, (BLOCK,)).to(CODES_TYPE), mask=mask)
    at, inside = scales_at(table, count, entry, batch, start, SCALES_TYPE, BLOCK)
    tl.store(at, scale.to(SCALES_TYPE), mask=inside)


def coded(
    X: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> list[each.Group]:
    """Return launches over matrices, their codes and their scales.

    Blocks are cut row by row. So a launch may take elements in the order of memory only if every
    matrix of the list lies row by row.
    """
    lists = (X, codes, [s.unsqueeze(-2) for s in scales])
    items = [item for item in tables.items(*lists) if not isinstance(item, int)]
    by_rows = all(v.order == 1 for item in items for views in item for v in views)
    return [group._replace(flat=group.flat and by_rows) for group in each.groups(lists)]


def quantize_blocks_(
    codes: list[Tensor], scales: list[Tensor], X: list[Tensor], signed: bool = True
) -> None:
    if not X or any(t.dtype == torch.float64 for t in (*X, *scales)):
        return ops.quantize_blocks_.definition(codes, scales, X, signed)
    values = table_of(signed, X[0].device)
    edges = (values[1:] + values[:-1]) / 2
    for group in coded(X, codes, scales):
        table = group.table((), X[0].device)
        quantize_kernel[(table.tiles,)](
            table.data, table.count, edges, table.steps, *group.constants, signed, **each.OPTIONS
        )
