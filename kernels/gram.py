"""X X^T: half of the tiles are computed, both halves written; long rows are cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import configs, tables, tiles
from . import elementwise as each
from .product import Launch, launches, plain, served, start
from .tables import Places, View, place

STEP = 512  # pieces begin at multiples of STEP, whatever block_k is


def pieces(n: int, length: int) -> int:
    """Return how many pieces the rows are cut into, for matrices with too few tiles to fill a GPU.

    The number depends on the shape of one matrix alone, so its sums do not depend on company. Below
    a length of 8192 the launch that adds the pieces costs what it saves. Pieces shorter than 8 n
    would write and read more than half as many bytes as X has (in 16 bits).
    """
    return min(16, length // max(2048, 8 * n)) if n <= 512 and length >= 8192 else 1


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    table, count, STEPS: tl.constexpr, OUT_TYPE: tl.constexpr, X_TYPE: tl.constexpr,
    WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out <- the sum of the pieces, added in order."""
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
    """Write out <- X X^T for a list of one dtype: one launch, and one more if rows are cut."""
    found = [pair for x, o in zip(X, out, strict=True) for pair in tables.views(x, o)]
    if found:
        places, results = zip(*found, strict=True)
        parts = X[0].new_empty(parts_size(places), dtype=torch.float32)
        sweep(places, results, parts.data_ptr(), X[0].device)


def stride_of(x: View) -> int:
    """Return elements from one piece's sum to the next, a multiple of 8."""
    return tables.cdiv(x.batch * x.rows * x.rows, 8) * 8


@tables.kept
def parts_size(X: Places) -> int:
    """Return the number of elements of all pieces' sums."""
    cut = [(x, pieces(x.rows, x.columns)) for x in X]
    return sum(count * stride_of(x) for x, count in cut if count > 1)


def sweep(X: Places, out: Places, parts: int, device: torch.device) -> None:
    """Write `grams` of places to places; the sums of pieces lie at address `parts`."""
    found, folds = planned(X, out, parts, device, configs.precision(X[0].dtype))
    start(found, device, symmetric=True)
    for group in folds:
        table = group.table((), device)
        fold_kernel[(table.tiles,)](
            table.data, table.count, table.steps, *group.constants, **each.OPTIONS
        )


@tables.kept
def planned(
    X: Places, out: Places, parts: int, device: torch.device, precision: str
) -> tuple[list[Launch], list[each.Group]]:
    """Return the launches of products, and those that add pieces."""
    products, items, extras = [], [], []
    for x, o in zip(X, out, strict=True):
        count = pieces(x.rows, x.columns)
        if count == 1:
            products.append(plain(x, x.mT, o, o))
            continue
        length = tables.cdiv(tables.cdiv(x.columns, count), STEP) * STEP
        address, batch, row, column = x.fields
        stride, begins = stride_of(x), range(0, x.columns, length)
        sums = [
            place(torch.float32, x.batch, x.rows, x.rows, (at, x.rows**2, x.rows, 1))
            for at in range(parts, parts + 4 * stride * len(begins), 4 * stride)
        ]
        for begin, piece in zip(begins, sums, strict=True):
            at = address + begin * column * x.dtype.itemsize
            width = min(length, x.columns - begin)
            part = place(x.dtype, x.batch, x.rows, width, (at, batch, row, column))
            products.append(plain(part, part.mT, piece, piece))
        items.append(((o, sums[0]),))
        extras.append((len(begins), stride))
        parts += 4 * stride * count
    sizes = (tuple(products), device, X[0].dtype, precision)
    found = launches("symmetric", *sizes, symmetric=True)
    return found, each.groups_of(tuple(items), tuple(extras), each.block_of(device))
