"""Power iteration on lists of matrices: each step reads W from memory once.

A program owns some lines of one matrix. It forms y = A x for them and, while they are in the cache,
their part of A^T y. Parts are added in order, so nothing is atomic. "v_first" is "u_first" on W^T.
A is W over a power of two that brings its largest magnitude near 1. So A is exact, and products of
float32 stay in range: the elements of W never meet double.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from orthonorm import ops
from torch import Tensor

from . import lines, tables, tiles
from .magnitude import powers_of

# fields after the head of `lines`: W, u and v as columns, number of the first matrix
U, V = tl.constexpr(lines.HEAD.value + 4), tl.constexpr(lines.HEAD.value + 8)
FIRST = tl.constexpr(lines.HEAD.value + 12)
LANES = lines.LANES
LARGE = tl.constexpr(2.0**120)


@triton.jit
def unit(entries, count, entry, batch, powers):
    """Return what times W is A, in double; 0 for a zero matrix and for one that is not finite."""
    power = tl.load(powers + tiles.field(entries, count, entry, FIRST) + batch)
    return tl.where(power == 0, 0.0, 1.0 / power)


@triton.jit
def scaled(w, inverse):
    """Return elements of W as elements of A, exact but where the result is a denormal.

    The inverse may be above float32's range: what is, is multiplied second. Infinity times 0 is
    NaN.
    """
    inside = tl.minimum(inverse, LARGE).to(tl.float32)
    above = tl.maximum(inverse / LARGE, 1.0).to(tl.float32)
    return w.to(tl.float32) * inside * above


@triton.jit
def clamped(norm, eps, inverse):
    """Return max(norm, eps over the power of two); NaN stays."""
    return tl.where(norm < eps * inverse, eps * inverse, norm)


@triton.jit
def ordered_sum(address, size):
    """Return the sum of `size` doubles, in an order that depends on `size` alone."""
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), dtype=tl.float64)
    for start in tl.range(0, size, LANES):
        total += tl.load(address + start + lane, mask=start + lane < size, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def y_norm(entries, count, entry, batch, y_squares):
    """Return |y| of a matrix from the sums of squares of its programs."""
    size = tiles.field(entries, count, entry, 1)
    first = tiles.field(entries, count, entry, 0) + batch * size
    return tl.sqrt(ordered_sum(y_squares + first, size))


@triton.jit(do_not_specialize=["count"])
def step_kernel(
    table, count, powers, right, y, parts, y_squares, STEPS: tl.constexpr,
    W_TYPE: tl.constexpr, ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    LINES: tl.constexpr, ALONG: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Write y = A v, and by program sums of y^2 and, if SECOND, parts of A^T y."""
    entries = table + 1
    entry, batch, first, left, length = lines.place(entries, count, STEPS, ALIGNED, LINES)
    inverse = unit(entries, count, entry, batch, powers)
    w, across, along = tiles.matrix(
        entries, count, entry, batch, lines.HEAD, W_TYPE, ORDER, ALIGNED
    )
    w = tiles.corner(w, across, along, first, 0, ALIGNED)
    line = tl.arange(0, LINES)
    step = tl.arange(0, ALONG)
    at = tiles.square(line, step, across, along)
    right += tiles.field(entries, count, entry, 5) + batch * length
    total = tl.zeros((LINES, ALONG), dtype=tl.float32)
    for start in tl.range(0, length, ALONG):
        inside = step < length - start
        x = tl.load(right + start + step, mask=inside, other=0.0)
        mask = (line < left)[:, None] & inside[None, :]
        w_at = tiles.corner(w, across, along, 0, tl.cast(start, tl.int64), ALIGNED)
        a = tl.load(w_at + at, mask=mask, other=0.0)
        total += scaled(a, inverse) * x[None, :]
    result = tl.sum(total, axis=1)
    y += tiles.field(entries, count, entry, 4) + first
    y += batch * tiles.field(entries, count, entry, 2)
    tl.store(y + line, result, mask=line < left)
    squares = result.to(tl.float64) * result.to(tl.float64)
    tl.store(y_squares + tl.program_id(0), tl.sum(squares, axis=0))
    if SECOND:
        parts = lines.part(entries, count, entry, length, parts)
        for start in tl.range(0, length, ALONG):
            inside = step < length - start
            mask = (line < left)[:, None] & inside[None, :]
            w_at = tiles.corner(w, across, along, 0, tl.cast(start, tl.int64), ALIGNED)
            a = scaled(tl.load(w_at + at, mask=mask, other=0.0), inverse)
            tl.store(parts + start + step, tl.sum(a * result[:, None], axis=0), mask=inside)


@triton.jit(do_not_specialize=["count", "blocks"])
def back_kernel(
    table, count, blocks, powers, left, z, parts, y_squares, z_squares,
    STEPS: tl.constexpr, W_TYPE: tl.constexpr,
):  # fmt: skip
    """Write z = A^T u and sums of z^2: from parts over |y|, or from the old u where y is zero."""
    entries = table + 1
    entry, batch, block = lines.lane_block(entries, count, blocks, STEPS)
    length = tiles.field(entries, count, entry, 3)
    if block * LANES < length:
        inverse = unit(entries, count, entry, batch, powers)
        lane = block * LANES + tl.arange(0, LANES)
        norm = y_norm(entries, count, entry, batch, y_squares)
        total = tl.zeros((LANES,), dtype=tl.float64)
        if norm != 0:
            total = lines.sum_of_parts(entries, count, entry, batch, length, parts, lane)
            total = total / clamped(norm, tiles.number(table, 0), inverse)
        else:
            w, across, along = tiles.matrix(
                entries, count, entry, batch, lines.HEAD, W_TYPE, 2, False
            )
            rows = tiles.field(entries, count, entry, 2)
            u = left + tiles.field(entries, count, entry, 4) + batch * rows
            for row in tl.range(0, rows):
                at = w + row * across + lane * along
                a = tl.load(at, mask=lane < length, other=0.0).to(tl.float64) * inverse
                total += a * tl.load(u + row).to(tl.float64)
        result = total.to(tl.float32)
        at = z + tiles.field(entries, count, entry, 5) + batch * length
        tl.store(at + lane, result, mask=lane < length)
        squares = result.to(tl.float64) * result.to(tl.float64)
        matrix = tiles.field(entries, count, entry, FIRST) + batch
        tl.store(z_squares + matrix * blocks + block, tl.sum(squares, axis=0))


@triton.jit
def replace(old_at, new_at, norm, divisor, mask):
    """Write old <- new / divisor, unless the norm is zero."""
    old = tl.load(old_at, mask=mask, other=0.0)
    new = tl.load(new_at, mask=mask, other=0.0).to(tl.float64) / divisor
    lines.settle()
    tl.store(old_at, tl.where(norm == 0, old, new.to(tl.float32)), mask=mask)


@triton.jit(do_not_specialize=["count", "blocks"])
def vectors_kernel(
    table, count, blocks, powers, left, right, y, z, y_squares, z_squares, replaced,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Write u <- y / max(|y|, eps) and v <- z / max(|z|, eps) in scratch, and mark them replaced.

    Where y or z is zero, the old vector stays.
    """
    entries = table + 1
    entry, batch, block = lines.lane_block(entries, count, blocks, STEPS)
    inverse = unit(entries, count, entry, batch, powers)
    eps = tiles.number(table, 0)
    rows = tiles.field(entries, count, entry, 2)
    length = tiles.field(entries, count, entry, 3)
    matrix = tiles.field(entries, count, entry, FIRST) + batch
    y_size = y_norm(entries, count, entry, batch, y_squares)
    z_size = tl.sqrt(ordered_sum(z_squares + matrix * blocks, blocks))
    lane = block * LANES + tl.arange(0, LANES)
    at = tiles.field(entries, count, entry, 4) + batch * rows + lane
    divisor = clamped(y_size, eps, inverse)
    replace(left + at, y + at, y_size, divisor, lane < rows)
    at = tiles.field(entries, count, entry, 5) + batch * length + lane
    divisor = clamped(z_size, eps, inverse)
    replace(right + at, z + at, z_size, divisor, lane < length)
    if block == 0:
        old = tl.load(replaced + 2 * matrix)
        tl.store(replaced + 2 * matrix, tl.where(y_size == 0, old, 1))
        old = tl.load(replaced + 2 * matrix + 1)
        tl.store(replaced + 2 * matrix + 1, tl.where(z_size == 0, old, 1))


@triton.jit(do_not_specialize=["count", "blocks"])
def start_kernel(
    table, count, blocks, left, right, STEPS: tl.constexpr, U_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
):  # fmt: skip
    """Copy u and v into scratch."""
    entries = table + 1
    entry, batch, block = lines.lane_block(entries, count, blocks, STEPS)
    rows = tiles.field(entries, count, entry, 2)
    length = tiles.field(entries, count, entry, 3)
    lane = block * LANES + tl.arange(0, LANES)
    u, step, _ = tiles.matrix(entries, count, entry, batch, U, U_TYPE, 2, False)
    v, skip, _ = tiles.matrix(entries, count, entry, batch, V, V_TYPE, 2, False)
    left += tiles.field(entries, count, entry, 4) + batch * rows
    right += tiles.field(entries, count, entry, 5) + batch * length
    x = tl.load(u + lane * step, mask=lane < rows, other=0.0)
    tl.store(left + lane, x.to(tl.float32), mask=lane < rows)
    x = tl.load(v + lane * skip, mask=lane < length, other=0.0)
    tl.store(right + lane, x.to(tl.float32), mask=lane < length)


@triton.jit(do_not_specialize=["count", "blocks"])
def end_kernel(
    table, count, blocks, powers, left, right, y, z_squares, replaced, sigmas,
    STEPS: tl.constexpr, U_TYPE: tl.constexpr, V_TYPE: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Write sigma; write u and v from scratch where steps replaced them and sigma is finite."""
    entries = table + 1
    entry, batch, block = lines.lane_block(entries, count, blocks, STEPS)
    rows = tiles.field(entries, count, entry, 2)
    length = tiles.field(entries, count, entry, 3)
    matrix = tiles.field(entries, count, entry, FIRST) + batch
    left += tiles.field(entries, count, entry, 4) + batch * rows
    right += tiles.field(entries, count, entry, 5) + batch * length
    local = tl.arange(0, LANES)
    if MOVED:  # u^T A v = |z|^2 / max(|z|, eps)
        inverse = unit(entries, count, entry, batch, powers)
        norm = tl.sqrt(ordered_sum(z_squares + matrix * blocks, blocks))
        divisor = clamped(norm, tiles.number(table, 0), inverse)
        sigma = tl.where(norm == 0, 0.0, norm * norm / divisor)
    else:  # y = A v
        y += tiles.field(entries, count, entry, 4) + batch * rows
        total = tl.zeros((LANES,), dtype=tl.float64)
        for start in tl.range(0, rows, LANES):
            mask = start + local < rows
            u = tl.load(left + start + local, mask=mask, other=0.0).to(tl.float64)
            total += u * tl.load(y + start + local, mask=mask, other=0.0).to(tl.float64)
        sigma = tl.sum(total, axis=0)
    finite = (sigma - sigma) == 0
    if block == 0:
        value = tl.where(finite, sigma * tl.load(powers + matrix), sigma - sigma)
        tl.store(sigmas + matrix, value.to(sigmas.dtype.element_ty))
    if MOVED:
        lane = block * LANES + local
        some = tl.where(finite, rows, 0) * tl.load(replaced + 2 * matrix)
        u, step, _ = tiles.matrix(entries, count, entry, batch, U, U_TYPE, 2, False)
        x = tl.load(left + lane, mask=lane < some, other=0.0)
        tl.store(u + lane * step, x.to(U_TYPE), mask=lane < some)
        some = tl.where(finite, length, 0) * tl.load(replaced + 2 * matrix + 1)
        v, step, _ = tiles.matrix(entries, count, entry, batch, V, V_TYPE, 2, False)
        x = tl.load(right + lane, mask=lane < some, other=0.0)
        tl.store(v + lane * step, x.to(V_TYPE), mask=lane < some)


def keyed(
    items: tuple[tables.Item, ...], transposed: bool
) -> Iterator[tuple[tuple[Any, ...], tables.Entry]]:
    """Yield (what entries of one launch have in common, entry without what depends on blocks)."""
    matrices = 0
    for item in items:
        if isinstance(item, int):
            matrices += item
            continue
        for w, left, right in item:
            if transposed:
                w, left, right = w.mT, right, left
            types = (tables.TYPES[x.dtype] for x in (w, left, right))
            fields = (*w.fields, *left.fields, *right.fields)
            yield (*types, w.order, w.aligned), (w.batch, w.rows, w.columns, *fields, matrices)
            matrices += w.batch


class Plan(NamedTuple):
    """Matrices of one launch."""

    types: tuple[Any, ...]
    constants: tuple[Any, ...]
    entries: tables.Entries
    scratch: lines.Sizes
    blocks: int  # number of blocks of LANES lanes per matrix


@tables.kept
def plans(items: tuple[tables.Item, ...], transposed: bool, device: torch.device) -> list[Plan]:
    """Return a plan for every launch."""
    made = []
    for (*types, order, aligned), plain in tables.grouped(keyed(items, transposed)).items():
        blocks = lines.blocks_of(device, order, True)
        before = lines.Sizes()
        entries = []
        for batch, height, width, *fields, matrices in plain:
            size = tables.cdiv(height, blocks[0])
            head = (batch * size, size, height, width, *before, batch)
            entries.append((*head, *fields, matrices))
            before = before.and_of(batch, height, width, size * width)
        constants = (types[0], order, aligned, *blocks)
        across = tables.cdiv(max(max(e[2:4]) for e in entries), LANES.value)
        entries = tables.Entries(entries, lines.MATRICES.value)
        made.append(Plan(tuple(types), constants, entries, before, across))
    return made


class Group:
    """A plan with the scratch memory of its kernels; `run` launches them."""

    def __init__(self, plan: Plan, eps: float, powers: Tensor):
        self.types, self.constants, entries, before, self.blocks = plan
        self.powers = powers
        self.table = entries.table((eps,), powers.device)
        self.lanes = (self.table.matrices * self.blocks,)  # of programs that own blocks of lanes

        def scratch(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=powers.device)

        self.left, self.y = scratch(before.lines), scratch(before.lines)
        self.right, self.z = scratch(before.across), scratch(before.across)
        self.parts = scratch(before.parts)
        self.y_squares = scratch(self.table.tiles, torch.float64)
        self.z_squares = scratch(powers.numel() * self.blocks, torch.float64)
        self.replaced = scratch(2 * powers.numel(), torch.int32)

    def run(self, steps: int, sigmas: Tensor) -> None:
        data, count, search = self.table.data, self.table.count, self.table.steps
        powers = self.powers
        left, right, y, z = self.left, self.right, self.y, self.z
        start_kernel[self.lanes](
            data, count, self.blocks, left, right, search, *self.types[1:], **lines.OPTIONS
        )
        for _ in range(max(steps, 1)):
            step_kernel[(self.table.tiles,)](
                data, count, powers, right, y, self.parts, self.y_squares, search,
                *self.constants, steps > 0, **lines.OPTIONS,
            )  # fmt: skip
            if steps > 0:
                back_kernel[self.lanes](
                    data, count, self.blocks, powers, left, z, self.parts, self.y_squares,
                    self.z_squares, search, self.types[0], **lines.OPTIONS,
                )  # fmt: skip
                vectors_kernel[self.lanes](
                    data, count, self.blocks, powers, left, right, y, z, self.y_squares,
                    self.z_squares, self.replaced, search, **lines.OPTIONS,
                )  # fmt: skip
        end_kernel[self.lanes](
            data, count, self.blocks, powers, left, right, y, self.z_squares, self.replaced,
            sigmas, search, *self.types[1:], steps > 0, **lines.OPTIONS,
        )  # fmt: skip


def power_iteration_(
    W: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    steps: int = 1,
    order: str = "u_first",
    eps: float = 0.0,
) -> Tensor:
    if not W or any(w.dtype == torch.float64 for w in W):
        return ops.power_iteration_.definition(W, u, v, steps, order, eps)
    powers = powers_of(W)
    sigmas = torch.zeros(powers.numel(), dtype=torch.float32, device=powers.device)
    columns = ([x.unsqueeze(-1) for x in some] for some in (u, v))
    for plan in plans(tables.items(W, *columns), order == "v_first", powers.device):
        Group(plan, eps, powers).run(steps, sigmas)
    return sigmas
