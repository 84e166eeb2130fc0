"""Tables: what a launch works on, a list of matrices as int64 numbers on the device.

A table holds, in this order, numbers (float64 as bits) and then fields, each with one value per
entry: field 0 is the entry's first tile, fields 1.. what the kernel wants to know, then for every
tensor its address and its strides over batch, rows and columns. An entry is a batch of matrices.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class View(NamedTuple):
    """A batch of matrices where it lies in memory."""

    dtype: torch.dtype
    batch: int
    rows: int
    columns: int
    fields: tuple[int, int, int, int]  # address, strides of batch, rows, columns

    @property
    def mT(self) -> View:
        address, batch, row, column = self.fields
        return View(self.dtype, self.batch, self.columns, self.rows, (address, batch, column, row))

    @property
    def order(self) -> int:
        """The unit stride: 1 along columns, 0 along rows, 2 neither."""
        _, _, row, column = self.fields
        return 1 if column == 1 else (0 if row == 1 else 2)

    @property
    def regular(self) -> bool:
        """Whether every matrix begins where an access of 16 bytes may."""
        address, batch, *_ = self.fields
        return address % 16 == 0 and batch % 8 == 0

    @property
    def aligned(self) -> bool:
        """Whether accesses along the unit stride may be 16 bytes wide and stay inside the matrix,
        and offsets within a tile of at most 512 rows inside 32 bits."""
        whole = self.order < 2 and self.rows % 8 == self.columns % 8 == 0
        strides = self.fields[2:]
        even = all(s == 1 or (s % 8 == 0 and s < 2**22) for s in strides)
        return whole and self.regular and even

    @property
    def dense(self) -> bool:
        """Whether the elements of one matrix fill one stretch of memory."""
        _, _, row, column = self.fields
        across, along = ((row, self.columns), (column, self.rows))[self.order == 0]
        return self.order < 2 and across == along


def views(*tensors: Tensor) -> list[tuple[View, ...]]:
    """Tensors over the same batch as views: one tuple, or several where batches do not fold."""
    strides = [batch_stride(t) for t in tensors]
    if any(s is None for s in strides):
        parts = zip(*(t.unbind(0) for t in tensors), strict=True)
        return [view for part in parts for view in views(*part)]
    return [tuple(view(t, s or 0) for t, s in zip(tensors, strides, strict=True))]


def batch_stride(t: Tensor) -> int | None:
    """The one stride of all leading dimensions, None if they have no common one."""
    dims = [(n, s) for n, s in zip(t.shape[:-2], t.stride()[:-2], strict=True) if n != 1]
    for (_, outer), (n, inner) in itertools.pairwise(dims):
        if outer != n * inner:
            return None
    return dims[-1][1] if dims else 0


def view(t: Tensor, batch_stride: int) -> View:
    shape, strides = (1, 1, *t.shape), (0, 0, *t.stride())
    rows, columns = shape[-2:]
    batch = t.numel() // (rows * columns) if t.numel() else 0
    fields = (t.data_ptr(), batch_stride, strides[-2], strides[-1])
    # a stride no step uses is free: the one that makes a single row or column dense
    if columns == 1 and rows != 1:
        fields = (*fields[:3], rows if fields[2] == 1 else 1)
    if rows == 1:
        fields = (*fields[:2], columns, fields[3])
    return View(t.dtype, batch, rows, columns, fields)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up: a hundredth of the time of Triton's, which checks what it is given."""
    return -(-a // b)


def bits(number: float) -> int:
    """A float64 as the int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def number(bits: int) -> float:
    """The float64 of these bits: an address on its way into a table's numbers."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


class Table(NamedTuple):
    """A table on the device and what a launch needs to know of it."""

    data: Tensor
    count: int  # entries
    tiles: int  # of all entries
    steps: int  # of a binary search among the entries


Entry = tuple[int, ...]  # tiles, then fields


def table(
    entries: Sequence[Entry],
    numbers: Iterable[float],
    device: torch.device,
    behind: Iterable[float] = (),
) -> Table:
    """The table of `entries`; the first value of each is the number of its tiles.

    `behind` are further numbers, as many as there may be, after the entries.
    """
    ends = list(itertools.accumulate(entry[0] for entry in entries))
    fields = zip([0, *ends[:-1]], *zip(*(entry[1:] for entry in entries), strict=True), strict=True)
    by_field = itertools.chain.from_iterable(zip(*fields, strict=True))
    values = (*map(bits, numbers), *by_field, *map(bits, behind))
    steps = (len(entries) - 1).bit_length()
    return Table(upload(values, device), len(entries), ends[-1], steps)


def upload(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    if not torch.cuda.is_current_stream_capturing():
        return _uploaded(values, device, torch.cuda.current_stream(device).cuda_stream)
    return written(values, device)


def written(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 as arguments of kernels: a graph keeps these, and copies from memory that may be gone
    it does not."""
    data = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(data.unbind(), list(values))
    return data


@lru_cache(maxsize=1024)  # steps meet the same tensors again and again
def _uploaded(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    pinned = torch.tensor(values, dtype=torch.int64).pin_memory()
    return pinned.to(device, non_blocking=True)


def grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, list[Any]]:
    """Values by key, in order."""
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def stretches(sizes: Sequence[int], limit: int) -> list[slice]:
    """Neighbours whose sizes add up to at most `limit`, one at least."""
    found, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > limit:
            found.append(slice(begin, i))
            begin, total = i, 0
        total += size
    return [*found, slice(begin, len(sizes))]
