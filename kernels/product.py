"""Products of matrices in lists, beta C + alpha A B in one launch: the kernel of all K1 words.

An end (`ends.py`) stores each tile, or makes an optimizer's step of it. The kernel is persistent:
each program walks tiles of the whole list. A symmetric product computes the lower triangle of tiles
and stores each twice, so that the result is symmetric bit for bit. Sums run in float32 along K in
one order whatever the tile shape. So results are the same alone or in company.

Loads use pointers, on sm_90 too. Descriptors could be made on the device, of addresses in a table.
They compile to the same warpgroup products in fewer registers (93 of 184 at 128 x 128). But every
tile then writes three of them (33 tensormap.replace, three fences) into 768 bytes of scratch per
program, which takes a process-wide allocator. And they serve one layout only, aligned (Triton 3.9,
2026-11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, ends, tables, tiles
from .configs import Config
from .ends import End, Extra
from .tables import View

EXTRA = tl.constexpr(5)  # after fields first tile, tiles of a matrix, M, N, K: two of the end
SIZES = tl.constexpr(7)  # after these: A, B, C, D and out
VIEW = tl.constexpr(4)  # number of fields of a tensor


@triton.jit
def nearest(x):
    """Return float32 rounded to TF32, ties away from zero.

    Tensor cores only cut the last 13 bits off, which makes each factor smaller by some 2^-11.
    """
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def multiply(
    entries, count, entry, batch, i, j, M, N, K,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, A_ORDER: tl.constexpr, B_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the tile of A B at corner (i, j), in float32, of factors rounded to DOT_TYPE.

    M and N are the rows and columns left from the corner on; K is the length of the sums.
    """
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a, a_row, a_column = tiles.matrix(
        entries, count, entry, batch, SIZES, A_TYPE, A_ORDER, ALIGNED
    )  # fmt: skip
    b, b_row, b_column = tiles.matrix(
        entries, count, entry, batch, SIZES + VIEW, B_TYPE, B_ORDER, ALIGNED
    )  # fmt: skip
    a = tiles.corner(a, a_row, a_column, i, 0, ALIGNED)
    b = tiles.corner(b, b_row, b_column, 0, j, ALIGNED)
    a_at = tiles.square(rows, inner, a_row, a_column)
    b_at = tiles.square(inner, columns, b_row, b_column)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        x = tl.load(a + a_at, mask=(rows < M)[:, None] & (inner < K - k)[None, :], other=0.0)
        y = tl.load(b + b_at, mask=(inner < K - k)[:, None] & (columns < N)[None, :], other=0.0)
        x, y = x.to(DOT_TYPE), y.to(DOT_TYPE)
        if PRECISION == "tf32":
            x, y = nearest(x), nearest(y)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        a += BLOCK_K * a_column
        b += BLOCK_K * b_row
    return acc


@triton.jit
def elements(
    entries, count, entry, batch, which: tl.constexpr, i, j, rows, columns,
    TYPE: tl.constexpr, ORDER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return addresses of the tile at (i, j) of tensor `which`."""
    address, down, across = tiles.matrix(
        entries, count, entry, batch, SIZES + which * VIEW, TYPE, ORDER, ALIGNED
    )
    address = tiles.corner(address, down, across, i, j, ALIGNED)
    return address + tiles.square(rows, columns, down, across)


@triton.jit
def place(
    entries, count, tile, STEPS: tl.constexpr, ALIGNED: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return a tile's entry, matrix, row and column among tiles, and corner, then M, N and K.

    M and N are the rows and columns left from the corner on.
    """
    entry = tiles.locate(entries, count, tile, STEPS)
    size = tiles.field(entries, count, entry, 1)
    M = tiles.side(entries, count, entry, 2, ALIGNED)
    N = tiles.side(entries, count, entry, 3, ALIGNED)
    K = tiles.side(entries, count, entry, 4, ALIGNED)
    inside = tile - tiles.field(entries, count, entry, 0)
    batch = inside // size
    inside = inside % size
    if SYMMETRIC:
        row, column = tiles.triangle(inside)
    else:
        row, column = tiles.striped(inside, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    i = row * BLOCK_M
    j = column * BLOCK_N
    return entry, batch, row, column, i, j, M - i.to(tl.int32), N - j.to(tl.int32), K


@triton.jit
def mirrored(
    acc, diagonal, entries, count, entry, batch, i, j, M, N, rows, columns,
    TYPE: tl.constexpr, ORDER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the transpose of a tile of a symmetric result, and return the tile.

    A tile on the diagonal is returned with its lower half on both sides, and nothing is stored.
    """
    mirror = tl.trans(acc)
    if diagonal:
        acc = tl.where(rows[:, None] >= columns[None, :], acc, mirror)
    else:
        at = elements(entries, count, entry, batch, 4, j, i, columns, rows, TYPE, ORDER, ALIGNED)
        mask = (columns < N)[:, None] & (rows < M)[None, :]
        tl.store(at, mirror.to(TYPE), mask=mask)
    return acc


@triton.jit(do_not_specialize=["count", "total"])
def product_kernel(
    table, count, total, first, second, STEPS: tl.constexpr,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, C_TYPE: tl.constexpr, D_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr, A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, C_ORDER: tl.constexpr,
    D_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr, ALIGNED: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, ADDED: tl.constexpr, SYMMETRIC: tl.constexpr, END: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Apply END to alpha A B; plus beta C if ADDED > 0; plus gamma D + delta I if ADDED is 2.

    ADDED is 2 only for symmetric products whose end has no numbers. Numbers: alpha, beta, then
    those of the end, or gamma and delta.
    """
    alpha = tiles.number(table, 0).to(tl.float32)
    beta = tiles.number(table, 1).to(tl.float32)
    numbers = table + 2
    entries = numbers + ends.NUMBERS
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        entry, batch, row, column, i, j, M, N, K = place(
            entries, count, tile, STEPS, ALIGNED, SYMMETRIC, BLOCK_M, BLOCK_N
        )
        acc = alpha * multiply(
            entries, count, entry, batch, i, j, M, N, K,
            A_TYPE, B_TYPE, A_ORDER, B_ORDER, ALIGNED, DOT_TYPE, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        c_at = elements(
            entries, count, entry, batch, 2, i, j, rows, columns, C_TYPE, C_ORDER, ALIGNED
        )
        d_at = elements(
            entries, count, entry, batch, 3, i, j, rows, columns, D_TYPE, D_ORDER, ALIGNED
        )
        if ADDED > 0:
            acc += beta * tl.load(c_at, mask=mask, other=0.0).to(tl.float32)
        if ADDED == 2:
            gamma = tiles.number(numbers, 0).to(tl.float32)
            acc += gamma * tl.load(d_at, mask=mask, other=0.0).to(tl.float32)
            if row == column:
                delta = tiles.number(numbers, 1).to(tl.float32)
                acc += tl.where(rows[:, None] == columns[None, :], delta, 0.0)
        if SYMMETRIC:
            acc = mirrored(
                acc, row == column, entries, count, entry, batch, i, j, M, N, rows, columns,
                OUT_TYPE, OUT_ORDER, ALIGNED,
            )  # fmt: skip
        out_at = elements(
            entries, count, entry, batch, 4, i, j, rows, columns, OUT_TYPE, OUT_ORDER, ALIGNED
        )
        END(
            out_at, acc, mask, c_at, d_at, numbers, entries, count, entry, EXTRA, first, second,
            batch, i, j,
        )  # fmt: skip


def served(op: str, dtype: torch.dtype, *tensors: Tensor) -> bool:
    """True if this kernel takes products in `dtype` of matrices shaped like the first tensor."""
    arch, _ = configs.device_of(tensors[0].device)
    wide = any(t.dtype == torch.float64 for t in tensors)
    return not wide and bool(configs.records(op, dtype, arch, min(tensors[0].shape[-2:])))


def fitting(
    choices: Sequence[Config],
    c_order: int,
    d_order: int,
    out_order: int,
    aligned: bool,
    function: Any = ends.store,
    rounds: bool = False,
) -> list[Config]:
    """Return the records whose tiles fit the registers.

    Reading C or D in another order than out is written takes twice the registers; so does an end
    that reads. An end of three tensors, or one that rounds by a seed, takes four times as many.
    64-bit offsets of every element, for what is not aligned, take more still. If the end's results
    depend on the tile, return one record, the largest.
    """
    limit = 128 * 256
    if c_order != out_order or d_order != out_order or function is not ends.store:
        limit = 128 * 128
    if function is ends.adam or rounds:
        limit = 128 * 64
    if not aligned:
        limit = 64 * 64
    fit = [c for c in choices if c.block_m * c.block_n <= limit]
    return fit[:1] if function in ends.OF_TILES else fit


class Factors(NamedTuple):
    """One product: an end writes beta C + alpha A B to out; beta = 0 leaves C out.

    C may be out, A or B. An end that needs more tensors than out has them as C and D.
    """

    A: View
    B: View
    C: View
    D: View
    out: View
    extra: Extra = ends.PLAIN

    @property
    def views(self) -> tuple[View, ...]:
        return self[:5]

    @property
    def key(self) -> tuple[object, ...]:
        """What products of one launch have in common."""
        aligned = all(v.aligned for v in self.views)
        types = (tables.TYPES[v.dtype] for v in self.views)
        return (*types, *(v.order for v in self.views), aligned)

    def tiles(self, config: Config, symmetric: bool) -> int:
        """Return the number of tiles of one matrix."""
        down = tables.cdiv(self.out.rows, config.block_m)
        across = tables.cdiv(self.out.columns, config.block_n)
        return down * (down + 1) // 2 if symmetric else down * across

    def entry(self, config: Config, symmetric: bool) -> tables.Entry:
        size = self.tiles(config, symmetric)
        sizes = (size, self.out.rows, self.out.columns, self.A.columns, *self.extra)
        return (self.out.batch * size, *sizes, *(f for v in self.views for f in v.fields))


def plain(A: View, B: View, C: View, out: View, extra: Extra = ends.PLAIN) -> Factors:
    """Return a product whose end needs no tensor but out."""
    return Factors(A, B, C, out, out, extra)


class Launch(NamedTuple):
    """A launch of the kernel, without its numbers and without its end's tensors."""

    entries: tables.Entries
    programs: int
    constants: tuple[Any, ...]
    options: dict[str, Any]


@tables.kept
def launches(
    op: str, products: tuple[Factors, ...], device: torch.device, dtype: torch.dtype,
    precision: str, function: Any = ends.store, rounds: bool = False, symmetric: bool = False,
    records: tuple[Config, ...] = (),
) -> list[Launch]:  # fmt: skip
    """Return a launch per set of dtypes and orders.

    They are kept: to make them takes the host longer than they take the device.
    """
    arch, _ = configs.device_of(device)
    found = []
    for key, group in tables.grouped((p.key, p) for p in products if p.out.batch).items():

        def count(config: Config, group: list[Factors] = group) -> int:
            return sum(p.out.batch * p.tiles(config, symmetric) for p in group)

        choices = fitting(records or configs.records(op, dtype, arch), *key[-4:], function, rounds)
        config = configs.pick(choices, device, count)
        entries = tables.Entries(p.entry(config, symmetric) for p in group)
        constants = (*key, tables.TYPES[dtype], precision)
        programs = configs.programs(device, count(config))
        found.append(Launch(entries, programs, constants, {**config.blocks, **config.options}))
    return found


def product(
    op: str,
    products: Sequence[Factors],
    device: torch.device,
    dtype: torch.dtype,
    alpha: float = 1.0,
    beta: float = 0.0,
    end: End = ends.STORE,
    symmetric: bool = False,
    records: Sequence[Config] = (),
) -> None:
    """Compute every product of the list, with a launch per set of dtypes and orders.

    Factors are rounded to `dtype`. `records` replace the table's, for tuning.
    """
    how = (configs.precision(dtype), end.function, end.rounds, symmetric, tuple(records))
    found = launches(op, tuple(products), device, dtype, *how)
    start(found, device, alpha, beta, end, symmetric)


def start(
    found: Sequence[Launch], device: torch.device, alpha: float = 1.0, beta: float = 0.0,
    end: End = ends.STORE, symmetric: bool = False, more: tuple[float, ...] = (),
) -> None:  # fmt: skip
    """Start the launches of one call of `launches`.

    `more` are gamma and delta; with them, gamma D + delta I is added.
    """
    numbers = (alpha, beta, *(more or end.padded))
    if more:
        numbers += (0.0,) * (2 + ends.NUMBERS.value - len(numbers))
    added = 2 if more else int(beta != 0)
    for launch in found:
        table = launch.entries.table(numbers, device)
        product_kernel[(launch.programs,)](
            table.data, table.count, table.tiles, end.first, end.second, table.steps,
            *launch.constants, added, symmetric, end.function, **launch.options,
        )  # fmt: skip
