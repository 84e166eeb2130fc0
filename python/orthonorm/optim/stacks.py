"""Matrices of one shape as one batch (k, ..., m, n): one call per shape, not per matrix.

With SOAP, 60 matrices of 64 x 64 and 30 of 64 x 128 take 7.3 ms a step instead of 13.7 one by one
(2 threads, 2026-11). State of matrices is allocated in stacks (batches.py), and each matrix has a
view. Their batch is then the stack itself: copies of SOAP's bases took 7 of 57 ms (llama-3m).
Tensors that lie elsewhere, as after some loads, are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..ops.steps import work_parts
from .state import Batch, Updates, by_step


def stacked(tensors: list[Tensor]) -> Tensor:
    """Return tensors of one shape as a batch: a view if they lie `in_a_row`, else a copy."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    if in_a_row(tensors):
        size = (len(tensors), *first.shape)
        return first.as_strided(size, (first.numel(), *first.stride()))
    return torch.stack(tensors)


def in_a_row(tensors: list[Tensor]) -> bool:
    """True if each is contiguous and begins in memory where the one before ends."""
    if torch.compiler.is_compiling():  # addresses cannot be traced
        return False
    first = tensors[0]
    size, begin = first.numel() * first.element_size(), first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    return size > 0 and all(
        t.data_ptr() == begin + i * size
        and t.dtype == first.dtype
        and t.untyped_storage().data_ptr() == storage
        and t.is_contiguous()
        for i, t in enumerate(tensors)
    )


@contextmanager
def in_place(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors as a batch; what is written to the batch reaches the tensors."""
    stack = stacked(tensors)
    yield stack
    if len(tensors) > 1 and not in_a_row(tensors):
        torch._foreach_copy_(tensors, list(stack.unbind()))


def write_(tensors: list[Tensor], indices: list[int], stack: Tensor) -> None:
    torch._foreach_copy_([tensors[i] for i in indices], list(stack.unbind()))


def alike(batch: Batch) -> Iterator[tuple[list[int], int]]:
    """Yield (indices, step) of matrices of one shape and step, as many as fit a work buffer."""
    for part in work_parts(batch.params):
        for indices in part:
            for t, some in by_step([batch.steps[i] for i in indices]):
                yield [indices[i] for i in some], t


def beside(updates: Updates, values: list[Tensor]) -> list[Tensor]:
    """Return state of the updates' matrices, stacked as the updates are."""
    found, first = [], 0
    for u in updates.stacks:
        found.append(stacked(values[first : (first := first + len(u))]))
    return found


def write_beside_(values: list[Tensor], stacks: list[Tensor]) -> None:
    torch._foreach_copy_(values, [x for stack in stacks for x in stack.unbind()])
