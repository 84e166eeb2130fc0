"""Memory for the results of a group of layers that is used again, forward after forward."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Kind = tuple[torch.Size, torch.dtype]
LINE = 64  # bytes: lists of one shape start at a cache line, as torch's tensors do


def serves(device: torch.device) -> bool:
    """Whether a Store may serve: memory of the host, and nothing that traces or wraps tensors."""
    eager = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    return device.type == "cpu" and eager


class Store:
    """Tensors in one block of CPU memory, which serves the next list once all of them are gone.

    Fresh memory costs as much as what is computed of it: the C library hands freed blocks of that
    size back to the system, which clears every page again (100 layers of 512x512: 12.1 ms of CPU
    time a forward, 10.1 in memory that is used again; 2026-11). Whoever keeps a tensor, such as the
    graph of an earlier forward, keeps its block; the next list then gets another.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._kinds: list[Kind] = []
        self._runs: list[_Run] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, ()  # a copy of a model has memory of its own

    def empty_like(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous uninitialized matrices of these shapes and dtypes.

        They share a storage but are no views, and each has a version counter of its own.
        """
        kinds = [(A.shape, A.dtype) for A in matrices]
        if kinds != self._kinds:
            self._kinds, self._runs = kinds, _runs(kinds)
        sizes = [run.size for run in self._runs]
        block = self._lease(sum(sizes))
        out: list[Tensor] = []
        for run, piece in zip(self._runs, block.split(sizes), strict=True):
            out += run.cut(piece)
        return out

    def _lease(self, size: int) -> Tensor:
        """`size` bytes of a block that comes back when nothing refers to them any more."""
        block = self._free.pop() if self._free else None
        if block is None or len(block) != size:  # the list has changed: the others are of no use
            self._free.clear()
            block = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size == 0:
            return block
        lease = (ctypes.c_char * size).from_address(block.data_ptr())
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8)


class _Run(NamedTuple):
    """Matrices of one shape and dtype behind each other, and the bytes that they take."""

    number: int
    shape: torch.Size
    dtype: torch.dtype
    size: int

    def cut(self, piece: Tensor) -> Sequence[Tensor]:
        rows, columns = self.shape
        if rows * columns == 0:
            return [piece.new_empty(self.shape, dtype=self.dtype) for _ in range(self.number)]
        stack = piece.view(self.dtype)[: self.number * rows * columns]
        # of all ways to cut a tensor the one that makes no views, in one call
        cut: Sequence[Tensor] = stack.view(self.number * rows, columns).unsafe_split(rows)
        return cut


def _runs(kinds: Sequence[Kind]) -> list[_Run]:
    runs = []
    for (shape, dtype), members in itertools.groupby(kinds):
        number = len(list(members))
        size = -(-number * dtype.itemsize * shape.numel() // LINE) * LINE
        runs.append(_Run(number, shape, dtype, size))
    return runs
