"""What Triton kernels share: reading tables, triangular tiles, addresses. Offsets are int64."""

import triton
import triton.language as tl


@triton.jit
def field(entries, count, entry, which):
    """Field `which` of an entry, int64."""
    return tl.load(entries + which * count + entry)


@triton.jit
def number(table, which):
    """A number of the table, float64."""
    return tl.load(table + which).to(tl.float64, bitcast=True)


@triton.jit
def locate(entries, count, tile, STEPS: tl.constexpr):
    """The last entry whose first tile is not after `tile`, by binary search."""
    low = count * 0
    high = count
    for _ in range(STEPS):
        middle = (low + high) // 2
        before = tl.load(entries + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def pointer(entries, count, entry, batch, which, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Matrix `batch` of the tensor whose fields begin at `which`."""
    address = field(entries, count, entry, which).to(tl.pointer_type(TYPE))
    stride = field(entries, count, entry, which + 1)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
        stride = tl.multiple_of(stride, 8)
    return address + batch * stride


@triton.jit
def offsets(
    entries, count, entry, rows, columns, which, ORDER: tl.constexpr, ALIGNED: tl.constexpr
):
    """Offsets of a tile in the tensor whose fields begin at `which`, by its order (see View)."""
    if ORDER == 1:
        across = field(entries, count, entry, which + 2)
        if ALIGNED:
            across = tl.multiple_of(across, 8)
        return rows[:, None] * across + columns[None, :]
    elif ORDER == 0:
        across = field(entries, count, entry, which + 3)
        if ALIGNED:
            across = tl.multiple_of(across, 8)
        return rows[:, None] + columns[None, :] * across
    else:
        row = field(entries, count, entry, which + 2)
        column = field(entries, count, entry, which + 3)
        return rows[:, None] * row + columns[None, :] * column


@triton.jit
def triangle(tile):
    """Row and column of tile `tile` of a lower triangle, numbered row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int64)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2
