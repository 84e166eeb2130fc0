"""Products of matrices in lists, beta C + alpha A B in one launch: the kernel of all K1 words.

Persistent: each program walks tiles of the whole list. A symmetric product computes the lower
triangle of tiles and stores each twice, so that the result is symmetric bit for bit. Sums run in
float32 along K in one order whatever the tile shape, so results are the same alone or in company.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, tables, tiles
from .configs import Config
from .tables import View

SIZES = tl.constexpr(5)  # fields: first tile, tiles of a matrix, M, N, K; then A, B, C and out
VIEW = tl.constexpr(4)  # fields of a tensor
STRIPE = tl.constexpr(8)  # tiles side by side that share columns of B while these are in L2


@triton.jit
def multiply(
    entries, count, entry, batch, rows, columns,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, A_ORDER: tl.constexpr, B_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of A B at `rows` and `columns`, float32; A is rounded to B's dtype."""
    M = tiles.field(entries, count, entry, 2)
    N = tiles.field(entries, count, entry, 3)
    K = tiles.field(entries, count, entry, 4)
    if ALIGNED:
        M = tl.multiple_of(M, 8)
        N = tl.multiple_of(N, 8)
        K = tl.multiple_of(K, 8)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    a = tiles.pointer(entries, count, entry, batch, SIZES, A_TYPE, ALIGNED)
    b = tiles.pointer(entries, count, entry, batch, SIZES + VIEW, B_TYPE, ALIGNED)
    acc = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + inner
        a_at = tiles.offsets(entries, count, entry, rows, k, SIZES, A_ORDER, ALIGNED)
        b_at = tiles.offsets(entries, count, entry, k, columns, SIZES + VIEW, B_ORDER, ALIGNED)
        x = tl.load(a + a_at, mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + b_at, mask=(k < K)[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(x.to(B_TYPE), y, acc, input_precision="ieee")
    return acc


@triton.jit
def product_kernel(
    table, count, total, decay, STEPS: tl.constexpr,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, C_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, C_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, ADDED: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = beta C + alpha A B, beta from the table, or from `decay` if that is given."""
    alpha = tiles.number(table, 0).to(tl.float32)
    beta = tiles.number(table, 1).to(tl.float32)
    if decay is not None:
        beta = tl.load(decay).to(tl.float32)
    entries = table + 2
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        entry = tiles.locate(entries, count, tile, STEPS)
        size = tiles.field(entries, count, entry, 1)
        M = tiles.field(entries, count, entry, 2)
        N = tiles.field(entries, count, entry, 3)
        inside = tile - tiles.field(entries, count, entry, 0)
        batch = inside // size
        inside = inside % size
        if SYMMETRIC:
            row, column = tiles.triangle(inside)
        else:
            across = tl.cdiv(N, BLOCK_N)
            stripe = STRIPE * across
            first = inside // stripe * STRIPE
            height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, STRIPE)
            row = first + inside % stripe % height
            column = inside % stripe // height
        rows = row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        acc = alpha * multiply(
            entries, count, entry, batch, rows, columns,
            A_TYPE, B_TYPE, A_ORDER, B_ORDER, ALIGNED, BLOCK_K,
        )  # fmt: skip
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        if ADDED:
            c = tiles.pointer(entries, count, entry, batch, SIZES + 2 * VIEW, C_TYPE, ALIGNED)
            at = tiles.offsets(
                entries, count, entry, rows, columns, SIZES + 2 * VIEW, C_ORDER, ALIGNED
            )
            acc += beta * tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
        out = tiles.pointer(entries, count, entry, batch, SIZES + 3 * VIEW, OUT_TYPE, ALIGNED)
        at = tiles.offsets(
            entries, count, entry, rows, columns, SIZES + 3 * VIEW, OUT_ORDER, ALIGNED
        )
        if SYMMETRIC:
            mirror = tl.trans(acc)
            acc = tl.where(rows[:, None] >= columns[None, :], acc, mirror)
            at_mirror = tiles.offsets(
                entries, count, entry, columns, rows, SIZES + 3 * VIEW, OUT_ORDER, ALIGNED
            )
            limit = tl.where(row == column, 0, N)  # a tile of the diagonal holds its own mirror
            above = (columns < limit)[:, None] & (rows < M)[None, :]
            tl.store(out + at_mirror, mirror.to(OUT_TYPE), mask=above)
        tl.store(out + at, acc.to(OUT_TYPE), mask=mask)


def served(op: str, *tensors: Tensor) -> bool:
    """Whether `configs/<op>.json` has records for these dtypes on their device."""
    arch, _ = configs.device_of(tensors[0].device)
    return all(configs.records(op, t.dtype, arch) for t in tensors)


class Factors(NamedTuple):
    """One product: out = beta C + alpha A B (C may be out, or A, or B; beta = 0 leaves it out)."""

    A: View
    B: View
    C: View
    out: View

    @property
    def key(self) -> tuple[object, ...]:
        """What one launch has in common."""
        aligned = all(v.aligned for v in self)
        return (*(tables.TYPES[v.dtype] for v in self), *(v.order for v in self), aligned)

    def tiles(self, config: Config, symmetric: bool) -> int:
        """Tiles of one matrix."""
        down = triton.cdiv(self.out.rows, config.block_m)
        across = triton.cdiv(self.out.columns, config.block_n)
        return down * (down + 1) // 2 if symmetric else down * across

    def entry(self, config: Config, symmetric: bool) -> tables.Entry:
        size = self.tiles(config, symmetric)
        sizes = (size, self.out.rows, self.out.columns, self.A.columns)
        return (self.out.batch * size, *sizes, *(f for v in self for f in v.fields))


def product(
    op: str,
    products: Sequence[Factors],
    device: torch.device,
    alpha: float = 1.0,
    beta: float = 0.0,
    decay: Tensor | None = None,
    symmetric: bool = False,
) -> None:
    """Every product of the list, in one launch per set of dtypes and orders."""
    added = beta != 0 or decay is not None
    for key, group in tables.grouped((p.key, p) for p in products if p.out.batch).items():

        def count(config: Config, group: list[Factors] = group) -> int:
            return sum(p.out.batch * p.tiles(config, symmetric) for p in group)

        config = configs.pick(op, group[0].B.dtype, device, count)
        assert config is not None, "callers ask `served` first"
        table = tables.table([p.entry(config, symmetric) for p in group], (alpha, beta), device)
        product_kernel[(configs.programs(device, table.tiles),)](
            table.data, table.count, table.tiles, decay, table.steps, *key, added, symmetric,
            **config.blocks, **config.options,
        )  # fmt: skip
