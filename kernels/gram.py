"""X X^T: half of the tiles computed, both halves written; long rows in pieces of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import elementwise as each
from . import tables, tiles
from .product import plain, product, served

STEP = 512  # pieces begin at multiples of it, whatever block_k is


def pieces(n: int, length: int) -> int:
    """Into how many pieces rows are cut where there are too few tiles to fill a GPU.

    By the shape of one matrix alone, so that its sums do not depend on company. Below 8192 the
    launch that adds the pieces costs what it saves; shorter pieces than 8 n would write and read
    more than half of what X is.
    """
    return min(16, length // max(2048, 8 * n)) if n <= 512 and length >= 8192 else 1


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    table, count, STEPS: tl.constexpr, OUT_TYPE: tl.constexpr, X_TYPE: tl.constexpr,
    WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out <- the sum of the pieces, in order."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    out_at = each.elements(table, count, entry, batch, start, local, 0, OUT_TYPE, FLAT)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.range(0, tiles.field(table, count, entry, each.HEAD + 8)):
        x_at = each.elements(table, count, entry, batch, start, local, 1, X_TYPE, FLAT)
        total += tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        start += tiles.field(table, count, entry, each.HEAD + 9)
    tl.store(out_at, total.to(OUT_TYPE), mask=mask)


def gram(X: Tensor) -> Tensor:
    if not served("symmetric", X.dtype, X):
        return ops.gram.definition(X)
    out = X.new_empty((*X.shape[:-1], X.shape[-2]))
    grams([X], [out])
    return out


def grams(X: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """out <- X X^T for a list of one dtype: one launch, and one more if rows are cut."""
    products, sums = [], []
    for x, o in zip(X, out, strict=True):
        count = pieces(*x.shape[-2:])
        if count == 1:
            products += [plain(a, a.mT, c, c) for a, c in tables.views(x, o)]
            continue
        # their stride is a multiple of 8
        stride = tables.cdiv(o.numel(), 8) * 8
        parts = o.new_empty(count * stride, dtype=torch.float32).view(count, stride)
        parts = parts[:, : o.numel()].view(count, *o.shape)
        length = tables.cdiv(tables.cdiv(x.shape[-1], count), STEP) * STEP
        for piece, part in zip(x.split(length, dim=-1), parts, strict=False):
            products += [plain(a, a.mT, c, c) for a, c in tables.views(piece, part)]
        sums.append((o, parts, (tables.cdiv(x.shape[-1], length), stride)))
    product("symmetric", products, X[0].device, X[0].dtype, symmetric=True)
    if sums:
        wholes, partials, extras = zip(*sums, strict=True)
        for group in each.groups([wholes, [p[0] for p in partials]], extras):
            table = group.table((), X[0].device)
            fold_kernel[(table.tiles,)](
                table.data, table.count, table.steps, *group.constants, **each.OPTIONS
            )
