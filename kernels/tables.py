"""Tables: the list of matrices that a launch works on, as int64 numbers on the device.

A table holds numbers (float64 as bits), then fields. A field has one value per entry; an entry is a
batch of matrices. Field 0 is the entry's first tile. Fields 1 and up are what the kernel needs.
Then follow, for every tensor, its address and its strides over batch, rows and columns.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

R = TypeVar("R")
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int64: tl.int64,
}


class View:
    """Place of a batch of matrices in memory.

    `place` makes one object for each, so equal ones are identical. As keys of what is kept between
    steps they cost nothing.

    Attributes:
        fields: address, strides of batch, rows, columns.
        order: the stride that is 1: 1 of columns, 0 of rows, 2 neither.
        regular: True if accesses of 16 bytes may begin where every matrix does.
        aligned: True if accesses along the unit stride may be 16 bytes wide and stay inside the
            matrix. Offsets within a tile of at most 512 rows then fit 32 bits.
        dense: True if the elements of one matrix fill one stretch of memory.
    """

    __slots__ = ("aligned", "batch", "columns", "dense", "dtype", "fields", "order", "regular",
                 "rows")  # fmt: skip

    def __init__(self, dtype: torch.dtype, batch: int, rows: int, columns: int, fields: Fields):
        self.dtype, self.batch, self.rows, self.columns = dtype, batch, rows, columns
        self.fields = fields
        address, skip, row, column = fields
        self.order = 1 if column == 1 else (0 if row == 1 else 2)
        self.regular = address % 16 == skip * dtype.itemsize % 16 == 0
        across, along = ((row, columns), (column, rows))[self.order == 0]
        whole = self.order < 2 and rows % 8 == columns % 8 == 0
        # `skip` has no bound: offsets of whole matrices are of 64 bits
        self.aligned = whole and self.regular and across % 8 == 0 and across < 2**22
        self.dense = self.order < 2 and across == along

    @property
    def wide(self) -> View:
        """The view with the short side first."""
        return self if self.rows <= self.columns else self.mT

    @property
    def mT(self) -> View:
        address, batch, row, column = self.fields
        return place(self.dtype, self.batch, self.columns, self.rows, (address, batch, column, row))


Fields = tuple[int, int, int, int]
Places = tuple[View, ...]
# Sizes of caches keyed by addresses. A step that meets the same addresses again makes nothing anew;
# a step whose gradients lie elsewhere each time leaves old entries behind. Each call in a step is
# an entry: 9 for Muon's one group, 82 for its twelve, 84 for SOAP's four. An entry of a hundred
# matrices takes some 100 KB on the host and 30 KB on the device, and its key has some 700 PARTS. A
# step makes some 11 views of each matrix, 1 KB each. (144 matrices, 2026-11)
LAUNCHES = 128
PARTS = 2**16
VIEWS = 128 * LAUNCHES
place = lru_cache(maxsize=VIEWS)(View)


def parts(key: object) -> int:
    """Return the number of values in nested tuples."""
    return sum(map(parts, key)) if isinstance(key, tuple) else 1


def kept(function: Callable[..., R]) -> _lru_cache_wrapper[R]:
    """Decorator: keep results by arguments; all are dropped when they hold too much.

    That is more than LAUNCHES entries and more than PARTS in their keys. A bound on entries alone
    would be met by a step of many small groups, and each would drop what the next step needs
    first. How many PARTS a step has does not depend on how its matrices are grouped.
    """
    held = 0

    @cache
    @wraps(function)
    def made(*values: Any, **more: Any) -> R:
        nonlocal held
        entries = made.cache_info().currsize
        if held > PARTS and entries >= LAUNCHES:
            made.cache_clear()
            entries = 0
        held = (held if entries else 0) + parts((values, tuple(more.values())))
        return function(*values, **more)

    return made


def dense(dtype: torch.dtype, batch: int, rows: int, columns: int, address: int) -> View:
    """Return the place of matrices that lie without gaps, row by row."""
    column = rows if columns == 1 else 1  # as in `view`
    return place(dtype, batch, rows, columns, (address, rows * columns, columns, column))


def views(*tensors: Tensor) -> list[tuple[View, ...]]:
    """Return tensors of one batch as views: one tuple, or several where batches do not fold."""
    folded = [view(t.dtype, t.shape, t.stride(), t.data_ptr()) for t in tensors]
    if None in folded:
        parts = zip(*(t.unbind(0) for t in tensors), strict=True)
        return [some for part in parts for some in views(*part)]
    return [tuple(v for v in folded if v is not None)]


Item = tuple[tuple[View, ...], ...] | int  # int: number of matrices without elements


def items(*lists: Sequence[Tensor]) -> tuple[Item, ...]:
    """Return views of each item of the lists, or its number of matrices if it has no elements."""
    return tuple(
        tuple(views(*tensors)) if tensors[0].numel() else tensors[0].shape[:-2].numel()
        for tensors in zip(*lists, strict=True)
    )


@lru_cache(maxsize=VIEWS)
def view(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], address: int
) -> View | None:
    """Return the place of a tensor, or None if its leading dimensions have no common stride."""
    batch_stride = 0
    dims = [(n, s) for n, s in zip(shape[:-2], strides[:-2], strict=True) if n != 1]
    for (_, outer), (n, inner) in itertools.pairwise(dims):
        if outer != n * inner:
            return None
    if dims:
        batch_stride = dims[-1][1]
    rows, columns = (1, 1, *shape)[-2:]
    batch = math.prod(shape[:-2]) if math.prod(shape) else 0
    row, column = (0, 0, *strides)[-2:]
    # a stride that is never used can be set: to the one that makes a single row or column dense
    if columns == 1 and rows != 1:
        column = rows if row == 1 else 1
    if rows == 1:
        row = columns
    return place(dtype, batch, rows, columns, (address, batch_stride, row, column))


def bits(number: float) -> int:
    """Return the int64 of the same bits as a float64."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def number(bits: int) -> float:
    """Return the float64 of these bits, to put an address among a table's numbers."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def doubles(numbers: Sequence[float]) -> bytes:
    """Return float64 numbers as bytes."""
    return struct.pack(f"<{len(numbers)}d", *numbers)


def integers(data: bytes) -> tuple[int, ...]:
    """Return bytes as int64."""
    return struct.unpack(f"<{len(data) // 8}q", data)


Entry = tuple[int, ...]  # number of tiles, then fields


class Table:
    """A table, and what a launch needs to know of it.

    That is `count`, the number of entries; `tiles`, the number of all tiles; `steps` of a binary
    search among entries; and `matrices`, the number of all matrices.
    """

    def __init__(self, values: tuple[int, ...], device: torch.device, sizes: tuple[int, ...]):
        self.count, self.tiles, self.steps, self.matrices = sizes
        self._values, self._device = values, device
        self._on: dict[int, Tensor] = {}

    @property
    def data(self) -> Tensor:
        """The table on the device, for use on the current stream."""
        return upload(self._values, self._device, self._on)


class Entries:
    """Entries of one launch, and tables made of them.

    The first value of an entry is its number of tiles; value `matrices`, if given, its number of
    matrices. In the table they are those of all entries before. Tables are kept, because steps meet
    the same tensors again and again.
    """

    def __init__(self, entries: Iterable[Entry], matrices: int = 0) -> None:
        self.entries = tuple(entries)
        fields = list(zip(*self.entries, strict=True))
        totals = {}
        for which in {0, matrices}:
            *before, totals[which] = itertools.accumulate(fields[which], initial=0)
            fields[which] = tuple(before)
        self._values = tuple(itertools.chain(*fields))
        count = len(self.entries)
        self._sizes = (count, totals[0], (count - 1).bit_length(), totals[matrices])
        self._tables: dict[Any, Table] = {}

    def table(
        self, numbers: Sequence[float], device: torch.device, behind: Sequence[float] = ()
    ) -> Table:
        """Return the table with these numbers; `behind`, of any length, follow the entries."""
        # by bits: an address among the numbers is a denormal, which torch.set_flush_denormal makes
        # equal to any other
        key = (doubles(numbers), device, doubles(behind))
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) == 8:  # numbers that change every step would fill it
                self._tables.clear()
            values = (*integers(key[0]), *self._values, *integers(key[2]))
            found = self._tables[key] = Table(values, device, self._sizes)
        return found


def upload(
    values: tuple[int, ...], device: torch.device, earlier: dict[int, Tensor] | None = None
) -> Tensor:
    """Return int64 on the device without waiting for it; `earlier` has results by stream."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        return written(values, device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if earlier is None:
        return _uploaded(values, device, stream)
    if stream not in earlier:
        earlier[stream] = copied(values, device)
    return earlier[stream]


def written(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 on a GPU, passed as arguments of kernels.

    A CUDA graph keeps arguments. A copy in it would read host memory that may be gone by then. A
    kernel takes 96 of them, or 672 since CUDA 13, and runs in every replay. So equal neighbours,
    as a field has of matrices of one shape, are one: a table of 72 products has 450, not 1951.
    """
    data = torch.zeros(len(values), dtype=torch.int64, device=device)
    runs = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    torch._foreach_add_(data.split([length for _, length in runs]), [value for value, _ in runs])
    return data


@kept
def _uploaded(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return copied(values, device)


def copied(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 on a GPU, copied in the order of its current stream without a wait."""
    pinned = torch.tensor(values, dtype=torch.int64).pin_memory()
    return pinned.to(device, non_blocking=True)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; Triton's own takes 5 us on the host."""
    return -(-a // b)


def grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, list[Any]]:
    """Return lists of values by key, in order."""
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def stretches(sizes: Sequence[int], limit: int) -> list[slice]:
    """Return slices of neighbours whose sizes add up to at most `limit`, but of one at least."""
    slices, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > limit:
            slices.append(slice(begin, i))
            begin, total = i, 0
        total += size
    return [*slices, slice(begin, len(sizes))]
