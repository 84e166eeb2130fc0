"""Sums of whole matrices, from those of the programs that own their lines.

One program per matrix adds them up, in an order that their number alone decides. Were they added
where they are needed, each program would read those of all others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .configs import FUSION

SUMS = tl.constexpr(3)  # per program: squares before, squares after, moments
MATRICES = tl.constexpr(7)  # field of an entry of `lines`: matrices of the launch before
CHUNK = tl.constexpr(1024)  # programs whose sums are in flight


@triton.jit
def add_up(entries, count, entry, batch, sums, totals):
    """Write the SUMS of a matrix."""
    size = tiles.field(entries, count, entry, 1)
    at = sums + (tiles.field(entries, count, entry, 0) + batch * size) * SUMS
    local = tl.arange(0, CHUNK)
    before = tl.zeros((CHUNK,), dtype=tl.float64)
    after = tl.zeros((CHUNK,), dtype=tl.float64)
    moments = tl.zeros((CHUNK,), dtype=tl.float64)
    for start in tl.range(0, size, CHUNK):
        mask = start + local < size
        own = at + (start + local) * SUMS
        before += tl.load(own, mask=mask, other=0.0)
        after += tl.load(own + 1, mask=mask, other=0.0)
        moments += tl.load(own + 2, mask=mask, other=0.0)
    totals += (tiles.field(entries, count, entry, MATRICES) + batch) * SUMS
    tl.store(totals, tl.sum(before, axis=0))
    tl.store(totals + 1, tl.sum(after, axis=0))
    tl.store(totals + 2, tl.sum(moments, axis=0))


@triton.jit(do_not_specialize=["count"])
def totals_kernel(table, count, sums, totals, STEPS: tl.constexpr, NUMBERS: tl.constexpr):
    """Write the SUMS of every matrix; NUMBERS are before the entries."""
    entries = table + NUMBERS
    matrix = tl.program_id(0).to(tl.int64)
    entry, batch = tiles.locate_matrix(entries, count, matrix, MATRICES, STEPS)
    add_up(entries, count, entry, batch, sums, totals)


@triton.jit
def total(entries, count, entry, batch, totals, which):
    """Return one of the SUMS of a matrix."""
    matrix = tiles.field(entries, count, entry, MATRICES) + batch
    return tl.load(totals + matrix * SUMS + which)


@triton.jit
def norm_ratio(entries, count, entry, batch, totals):
    """Return what gives a matrix the norm it had before; 0 if it has none left."""
    before = total(entries, count, entry, batch, totals, 0)
    after = total(entries, count, entry, batch, totals, 1)
    return tl.where(after == 0, 0.0, tl.sqrt(before / after))


def memory(table: tables.Table, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for the sums of a launch's programs, and for those of its matrices."""
    counts = (table.tiles, table.matrices)
    sums, totals = (torch.empty(n, SUMS.value, dtype=torch.float64, device=device) for n in counts)
    return sums, totals


def write(table: tables.Table, numbers: int, sums: Tensor, totals: Tensor) -> None:
    """Write the sums of all matrices from those of programs; the table has so many numbers."""
    totals_kernel[(table.matrices,)](
        table.data, table.count, sums, totals, table.steps, numbers, num_warps=4, **FUSION
    )
