"""Reductions along lines, in double and in order: rows, or columns as rows of the transposed view.

A program owns some lines of one matrix and walks along them. So sums need no atomics and do not
depend on company. A program may also leave a sum for every place across its lines, its parts. An
entry's fields: first program, programs of a matrix, lines, their length, first line, place across
and part in the list, matrices of the launch before. Then follow X and the moments (`tables.View`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise as each
from . import tables, tiles, totals
from .configs import FUSION
from .totals import MATRICES, SUMS

HEAD = tl.constexpr(8)
PARTS = tl.constexpr(6)
LANES = tl.constexpr(128)
DEPTH = tl.constexpr(16)  # parts in flight: one after the other, each would wait for memory
INSIDE, CLAMP = tl.constexpr(1), tl.constexpr(2)
RAW = tl.constexpr(3)  # the moment itself, in place of a factor
EPS_AT = {"outside": 0, "inside": 1, "clamp": 2}
OPTIONS = dict(num_warps=4, **FUSION)


@triton.jit
def place(entries, count, STEPS: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr):
    """Return this program's entry, matrix, first line, lines left from there, and their length."""
    program = tl.program_id(0).to(tl.int64)
    entry = tiles.locate(entries, count, program, STEPS)
    size = tiles.field(entries, count, entry, 1)
    inside = program - tiles.field(entries, count, entry, 0)
    first = inside % size * LINES
    lines = (tiles.side(entries, count, entry, 2, ALIGNED) - first).to(tl.int32)
    return entry, inside // size, first, lines, tiles.side(entries, count, entry, 3, ALIGNED)


@triton.jit
def part(entries, count, entry, length, parts):
    """Return the address of this program's parts."""
    program = tl.program_id(0) - tiles.field(entries, count, entry, 0)
    return parts + tiles.field(entries, count, entry, PARTS) + program * length


@triton.jit
def lane_block(entries, count, blocks, STEPS: tl.constexpr):
    """Return this program's entry, matrix and block of lanes; each matrix has `blocks` of them."""
    program = tl.program_id(0).to(tl.int64)
    entry, batch = tiles.locate_matrix(entries, count, program // blocks, MATRICES, STEPS)
    return entry, batch, program % blocks


@triton.jit
def added(at, lane, inside, size, apart, DEPTH: tl.constexpr):
    """Return the float64 sums, in one order, of `size` numbers `apart` at these lanes `inside`."""
    step = tl.arange(0, DEPTH)
    at += tiles.square(step, lane, apart, 1)
    total = tl.zeros((DEPTH, lane.shape[0]), dtype=tl.float64)
    for start in tl.range(0, size, DEPTH):
        mask = (step < size - start)[:, None] & inside[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        at += DEPTH * apart
    return tl.sum(total, axis=0)


@triton.jit
def sum_of_parts(entries, count, entry, batch, length, parts, lane):
    """Return a matrix's sums across at these lanes: the parts of its programs."""
    size = tiles.field(entries, count, entry, 1)
    at = parts + tiles.field(entries, count, entry, PARTS) + batch * size * length
    return added(at, lane, lane < length, size, length, DEPTH)


@triton.jit
def squares(x, across, along, lines, length, parts, LINES: tl.constexpr, ALONG: tl.constexpr):
    """Return sums of squares of lines from address x on; store sums across to `parts`, if any."""
    line = tl.arange(0, LINES)
    step = tl.arange(0, ALONG)
    at = tiles.square(line, step, across, along)
    total = tl.zeros((LINES, ALONG), dtype=tl.float64)
    for start in tl.range(0, length, ALONG):
        mask = (line < lines)[:, None] & (step < length - start)[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float64)
        value *= value
        if parts is not None:
            tl.store(parts + start + step, tl.sum(value, axis=0), mask=step < length - start)
        total += value
        x += ALONG * along
    return tl.sum(total, axis=1)


@triton.jit
def denominator(moment, eps, EPS_AT: tl.constexpr):
    """Return sqrt(moment) with eps added inside or outside, or as a lower bound, by EPS_AT."""
    if EPS_AT == INSIDE:
        return each.root(moment + eps)
    else:
        base = each.root(moment)
        if EPS_AT == CLAMP:
            return tl.where(base < eps, eps, base)
        else:
            return base + eps


@triton.jit
def inverse(moment, eps, EPS_AT: tl.constexpr):
    """Return 1 / denominator, or 0 where that is 0."""
    below = denominator(moment, eps, EPS_AT)
    return tl.where(below == 0, 0.0, 1.0 / below)


@triton.jit
def scale(
    x, across, along, out, out_across, out_along, lines, length, factor,
    LINES: tl.constexpr, ALONG: tl.constexpr, OUT_TYPE: tl.constexpr,
):  # fmt: skip
    """Write out <- x times the factor of its line, in double, from these addresses on."""
    line = tl.arange(0, LINES)
    step = tl.arange(0, ALONG)
    at = tiles.square(line, step, across, along)
    out_at = tiles.square(line, step, out_across, out_along)
    for start in tl.range(0, length, ALONG):
        mask = (line < lines)[:, None] & (step < length - start)[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float64) * factor[:, None]
        if tl.float64 != OUT_TYPE:
            value = value.to(tl.float32)
        tl.store(out + out_at, value.to(OUT_TYPE), mask=mask)
        x += ALONG * along
        out += ALONG * out_along


@triton.jit
def settle():
    """Separate reads of few elements from writes of the same elements.

    Several threads hold each such element, and one writes it. Triton lets it write before the
    others have read (its issue 1615).
    """
    tl.debug_barrier()


@triton.jit
def average(
    table, entries, count, entry, batch, first, lines, length, total, factors, sums,
    V: tl.constexpr, V_TYPE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
    EPS_AT: tl.constexpr,
):  # fmt: skip
    """Write v <- beta2 v + (1 - beta2) total / length of every line, and what follows from it.

    That is the line's factor, and this program's SUMS for norms and means. v's fields begin at V.
    Numbers: beta2, 1 - beta2, eps.
    """
    v, step, _ = tiles.matrix(entries, count, entry, batch, V, V_TYPE, 2, False)
    line = tl.arange(0, LINES)
    v_at = v + (first + line) * step
    old = tl.load(v_at, mask=line < lines, other=0.0).to(tl.float64)
    new = tiles.number(table, 0) * old + tiles.number(table, 1) * (total / length)
    settle()
    tl.store(v_at, new.to(WIDE).to(V_TYPE), mask=line < lines)
    factor = new
    if EPS_AT != RAW:
        factor = inverse(new, tiles.number(table, 2), EPS_AT)
    slot = tiles.field(entries, count, entry, 4)
    slot += batch * tiles.field(entries, count, entry, 2) + first
    tl.store(factors + slot + line, factor, mask=line < lines)
    at = sums + tl.program_id(0).to(tl.int64) * SUMS
    real = line < lines
    tl.store(at, tl.sum(total, axis=0))
    tl.store(at + 1, tl.sum(tl.where(real, total * factor * factor, 0.0), axis=0))
    tl.store(at + 2, tl.sum(tl.where(real, new, 0.0), axis=0))


@triton.jit(do_not_specialize=["count"])
def moments_kernel(
    table, count, factors, sums, parts, STEPS: tl.constexpr,
    X_TYPE: tl.constexpr, V_TYPE: tl.constexpr, WIDE: tl.constexpr, X_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr, EPS_AT: tl.constexpr,
):  # fmt: skip
    """Write `average` of the squares of X."""
    entries = table + 3
    entry, batch, first, lines, length = place(entries, count, STEPS, ALIGNED, LINES)
    x, across, along = tiles.matrix(entries, count, entry, batch, HEAD, X_TYPE, X_ORDER, ALIGNED)
    x = tiles.corner(x, across, along, first, 0, ALIGNED)
    if parts is not None:
        parts = part(entries, count, entry, length, parts)
    total = squares(x, across, along, lines, length, parts, LINES, ALONG)
    average(
        table, entries, count, entry, batch, first, lines, length, total, factors, sums,
        HEAD + 4, V_TYPE, WIDE, LINES, EPS_AT,
    )  # fmt: skip


@triton.jit
def factor_of(
    entries, count, entry, batch, first, lines, factors, whole,
    LINES: tl.constexpr, KEEP_NORM: tl.constexpr,
):  # fmt: skip
    """Return the factors of this program's lines; with KEEP_NORM the matrix keeps its norm.

    `whole` are sums of matrices, which KEEP_NORM needs.
    """
    line = tl.arange(0, LINES)
    slot = tiles.field(entries, count, entry, 4)
    slot += batch * tiles.field(entries, count, entry, 2) + first
    factor = tl.load(factors + slot + line, mask=line < lines, other=0.0)
    if KEEP_NORM:
        factor = factor * totals.norm_ratio(entries, count, entry, batch, whole)
    return factor


@triton.jit(do_not_specialize=["count"])
def rescale_kernel(
    table, count, factors, whole, STEPS: tl.constexpr,
    X_TYPE: tl.constexpr, V_TYPE: tl.constexpr, WIDE: tl.constexpr, X_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr, KEEP_NORM: tl.constexpr,
):  # fmt: skip
    """Write x <- x times the factor of its line; with KEEP_NORM the matrix keeps its norm."""
    entries = table + 3
    entry, batch, first, lines, length = place(entries, count, STEPS, ALIGNED, LINES)
    factor = factor_of(
        entries, count, entry, batch, first, lines, factors, whole, LINES, KEEP_NORM
    )  # fmt: skip
    x, across, along = tiles.matrix(entries, count, entry, batch, HEAD, X_TYPE, X_ORDER, ALIGNED)
    x = tiles.corner(x, across, along, first, 0, ALIGNED)
    scale(x, across, along, x, across, along, lines, length, factor, LINES, ALONG, X_TYPE)


@triton.jit(do_not_specialize=["count"])
def normalize_kernel(
    table, count, STEPS: tl.constexpr,
    X_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, WIDE: tl.constexpr, X_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr, EPS_AT: tl.constexpr,
):  # fmt: skip
    """Write out <- x / (scale |line| + eps), eps placed by EPS_AT. Numbers: scale, eps."""
    entries = table + 2
    entry, batch, first, lines, length = place(entries, count, STEPS, ALIGNED, LINES)
    x, across, along = tiles.matrix(entries, count, entry, batch, HEAD, X_TYPE, X_ORDER, ALIGNED)
    x = tiles.corner(x, across, along, first, 0, ALIGNED)
    total = squares(x, across, along, lines, length, None, LINES, ALONG)
    factor = tiles.number(table, 0)
    factor = inverse(total * factor * factor, tiles.number(table, 1), EPS_AT)
    out, down, over = tiles.matrix(
        entries, count, entry, batch, HEAD + 4, OUT_TYPE, X_ORDER, ALIGNED
    )
    out = tiles.corner(out, down, over, first, 0, ALIGNED)
    scale(x, across, along, out, down, over, lines, length, factor, LINES, ALONG, OUT_TYPE)


class Group(NamedTuple):
    """Entries of one launch, and what they have in common."""

    types: tuple[Any, ...]
    wide: Any
    order: int
    aligned: bool
    blocks: tuple[int, int]
    entries: tables.Entries

    def constants(self, *which: int) -> tuple[Any, ...]:
        """Return constants that every kernel takes after STEPS, with types of tensors `which`."""
        types = (self.types[i] for i in which)
        return (*types, self.wide, self.order, self.aligned, *self.blocks)


def blocks_of(device: torch.device, order: int, parts: bool = False) -> tuple[int, int]:
    """Return lines per program, and elements of a line at a time, wider if contiguous.

    With `parts` lines are more, for fewer sums across, yet few enough for the second-level cache.
    """
    if device.type == "cpu":
        return (16, 32) if parts or order else (32, 16)
    if order == 1:
        return (32, 128) if parts else (8, 256)
    return (64, 32)


def options(lines: int, along: int) -> dict[str, Any]:
    """Return a launch's options, by the elements that a program takes at a time."""
    return OPTIONS | dict(num_warps=8 if lines * along > 2048 else 4)


class Sizes(NamedTuple):
    """Totals of a list: lines, places across, and parts."""

    lines: int = 0
    across: int = 0
    parts: int = 0

    def and_of(self, batch: int, rows: int, columns: int, parts: int) -> Sizes:
        """Return the totals with `batch` more matrices of these sizes."""
        more = (rows, columns, parts)
        return Sizes(*(size + batch * n for size, n in zip(self, more, strict=True)))


def groups(
    X: Sequence[Tensor],
    *others: Sequence[Tensor],
    columns: bool,
    whole: bool,
    parts: bool = False,
    slots: Callable[[int], int] | None = None,
    extras: Sequence[tables.Entry] = (),
) -> tuple[list[Group], Sizes]:
    """Return launches of tuples of tensors by dtypes, order and alignment, and totals of the list.

    With `columns`, columns are the lines. With `whole`, the first of `others` has the shape of X,
    not one number per line. `parts` says that kernels leave sums across (`blocks_of`). A matrix's
    parts are a sum per program and place across, or `slots(length)` sums of every line. `extras`
    are further int64 fields of each item.
    """
    extras = tuple(extras) or ((),) * len(X)
    how = (columns, whole, parts, slots, X[0].device)
    return groups_of(tables.items(X, *others), extras, *how)


@tables.kept
def groups_of(
    items: tuple[tables.Item, ...], extras: tuple[tables.Entry, ...], columns: bool, whole: bool,
    parts: bool, slots: Callable[[int], int] | None, device: torch.device,
) -> tuple[list[Group], Sizes]:  # fmt: skip
    keyed: list[tuple[Any, tables.Entry]] = []
    sizes = Sizes()
    for item, extra in zip(items, extras, strict=True):
        for views in () if isinstance(item, int) else item:
            if columns:
                views = tuple(v.mT for v in views)
            x, other, *_ = views
            order = x.order if not whole or x.order == other.order else 2
            aligned = x.aligned and order < 2 and (not whole or other.aligned)
            blocks = blocks_of(device, order, parts)
            size = tables.cdiv(x.rows, blocks[0])
            head = (x.batch * size, size, x.rows, x.columns, *sizes, x.batch)
            entry = (*head, *(f for v in views for f in v.fields), *extra)
            keyed.append(((tuple(v.dtype for v in views), order, aligned, blocks), entry))
            sums = x.rows * slots(x.columns) if slots else size * x.columns
            sizes = sizes.and_of(x.batch, x.rows, x.columns, sums)
    launches = []
    for (dtypes, order, aligned, blocks), entries in tables.grouped(keyed).items():
        wide = tl.float64 if torch.float64 in dtypes else tl.float32
        types = tuple(tables.TYPES[d] for d in dtypes)
        made = tables.Entries(entries, MATRICES.value)
        launches.append(Group(types, wide, order, aligned, blocks, made))
    return launches, sizes


def moment(
    moments: Sequence[Tensor], X: Sequence[Tensor], columns: bool, numbers: tuple[float, ...],
    eps_at: str, keep_norm: bool,
) -> None:  # fmt: skip
    """Compute `row_moment_`, or `column_moment_` if `columns`: two passes over X.

    They are a launch each; one between them adds up norms, if these are kept.
    """
    if not X:
        return
    device = X[0].device
    launches, sizes = groups(X, moments, columns=columns, whole=False)
    factors = torch.empty(sizes.lines, dtype=torch.float64, device=device)
    for group in launches:
        table = group.entries.table(numbers, device)
        sums, whole = totals.memory(table, device)
        steps = (table.steps, *group.constants(0, 1))
        moments_kernel[(table.tiles,)](
            table.data, table.count, factors, sums, None, *steps, EPS_AT[eps_at], **OPTIONS
        )
        if keep_norm:
            totals.write(table, len(numbers), sums, whole)
        rescale_kernel[(table.tiles,)](
            table.data, table.count, factors, whole, *steps, keep_norm, **OPTIONS
        )


def normalize(X: Tensor, columns: bool, scale: float, eps: float, eps_at: str) -> Tensor:
    """Return `row_normalize`, or `column_normalize` if `columns`: one launch."""
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    normalize_list([X], [out], columns, scale, eps, eps_at)
    return out


def normalize_list(
    X: Sequence[Tensor], out: Sequence[Tensor], columns: bool, scale: float, eps: float,
    eps_at: str = "outside",
) -> None:  # fmt: skip
    """Write `normalize` of a list to given memory."""
    if not X:
        return
    for group in groups(X, out, columns=columns, whole=True)[0]:
        table = group.entries.table((scale, eps), X[0].device)
        normalize_kernel[(table.tiles,)](
            table.data, table.count, table.steps, *group.constants(0, 1), EPS_AT[eps_at], **OPTIONS
        )
