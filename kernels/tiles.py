"""Shared parts of Triton kernels: reading tables, order of tiles, addresses.

Addresses of tiles are int64. Offsets within a tile are int64 too, or int32 if the launcher found
that they cannot overflow (`tables.View.aligned`).
"""

import triton
import triton.language as tl


@triton.jit
def field(entries, count, entry, which):
    """Return field `which` of an entry, int64."""
    return tl.load(entries + which * count + entry)


@triton.jit
def number(table, which):
    """Return number `which` of the table, float64."""
    return tl.load(table + which).to(tl.float64, bitcast=True)


@triton.jit
def locate(entries, count, tile, STEPS: tl.constexpr):
    """Return the last entry whose first tile is not after `tile`, by binary search."""
    low = count * 0
    high = count
    for _ in range(STEPS):
        middle = (low + high) // 2
        before = tl.load(entries + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def locate_matrix(entries, count, matrix, which, STEPS: tl.constexpr):
    """Return the entry of a launch's matrix, and which of the entry's it is.

    Field `which` is the number of matrices before an entry. So matrices of all entries lie on one
    axis of the grid, the one that takes more than 65535.
    """
    entry = locate(entries + which * count, count, matrix, STEPS)
    return entry, matrix - field(entries, count, entry, which)


@triton.jit
def side(entries, count, entry, which, ALIGNED: tl.constexpr):
    """Return a side of an entry's matrices, int32."""
    value = field(entries, count, entry, which).to(tl.int32)
    if ALIGNED:  # a multiple of 8 by arithmetic: Triton 3.6 forgets what it is told of a cast
        value = value // 8 * 8
    return value


@triton.jit
def stride(entries, count, entry, which, ALIGNED: tl.constexpr):
    """Return a stride of a tensor: int32 if aligned, as tiles then fit 32 bits, else int64."""
    value = field(entries, count, entry, which)
    if ALIGNED:
        value = value.to(tl.int32) // 8 * 8
    return value


@triton.jit
def matrix(
    entries, count, entry, batch, which,
    TYPE: tl.constexpr, ORDER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return address and strides of matrix `batch` of the tensor whose fields begin at `which`."""
    address = field(entries, count, entry, which).to(tl.pointer_type(TYPE))
    skip = field(entries, count, entry, which + 1)
    row = 1
    column = 1
    if ORDER != 0:
        row = stride(entries, count, entry, which + 2, ALIGNED)
    if ORDER != 1:
        column = stride(entries, count, entry, which + 3, ALIGNED)
    address += batch * skip
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address, row, column


@triton.jit
def corner(address, row, column, i, j, ALIGNED: tl.constexpr):
    """Return the address of element (i, j), both int64, where a tile begins."""
    address += i * row + j * column
    if ALIGNED:  # stated of every sum: Triton 3.6 forgets what it is told of casts and parts
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def square(rows, columns, row, column):
    """Return offsets of a tile's elements from its corner."""
    return rows[:, None] * row + columns[None, :] * column


@triton.jit
def triangle(tile):
    """Return row and column of tile `tile` of a lower triangle, numbered row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int64)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def striped(tile, down, across):
    """Return row and column of a tile, in stripes of 8 rows that share columns while in L2."""
    stripe = 8 * across
    first = tile // stripe * 8
    height = tl.minimum(down - first, 8)
    inside = tile % stripe
    return first + inside % height, inside // height
