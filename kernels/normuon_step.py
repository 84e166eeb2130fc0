"""NorMuon's step on a list: momentum, iterations, and one pass over their result.

The last product of the iterations also adds the squares of every row. So the pass that remains can
normalize and write the weights.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from orthonorm import ops
from orthonorm.ops.steps import ACCELERATOR_WORK
from torch import Tensor

from . import ends, lines, tables, tiles, totals
from .muon_prologue import muon_prologue_
from .newton_schulz import Iteration, Target

SLOTS = tl.constexpr(16)  # sums of a line that a program has in flight
NUMBERS = tl.constexpr(3)  # beta2, 1 - beta2, eps
W, X, V, FACTOR = (tl.constexpr(lines.HEAD.value + k) for k in (0, 4, 8, 12))  # first fields


@triton.jit(do_not_specialize=["count"])
def row_moments_kernel(
    table, count, parts, factors, sums, STEPS: tl.constexpr,
    V_TYPE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Write `lines.average` of the squares that products have summed; slots are added in order."""
    entries = table + NUMBERS
    entry, batch, first, left, length = lines.place(entries, count, STEPS, False, LINES)
    rows = tiles.field(entries, count, entry, 2)
    line = tl.arange(0, LINES)
    slots = tl.cdiv(length, ends.GRAIN)
    at = parts + tiles.field(entries, count, entry, lines.PARTS) + batch * slots * rows + first
    total = lines.added(at, line, line < left, slots, rows, SLOTS)
    lines.average(
        table, entries, count, entry, batch, first, left, length, total, factors, sums,
        V, V_TYPE, tl.float32, LINES, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def normalized_update_kernel(
    table, count, factors, whole, lr, weight_decay, STEPS: tl.constexpr, W_TYPE: tl.constexpr,
    X_TYPE: tl.constexpr, WIDE: tl.constexpr, X_ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Write W <- (1 - lr weight_decay) W - lr factor O, with each row of O times its own factor."""
    entries = table + NUMBERS
    entry, batch, first, left, length = lines.place(entries, count, STEPS, ALIGNED, LINES)
    factor = lines.factor_of(entries, count, entry, batch, first, left, factors, whole, LINES, True)
    rate = tl.load(lr).to(tl.float64)
    kept = (1.0 - rate * tl.load(weight_decay).to(tl.float64)).to(WIDE)
    scale = tiles.field(entries, count, entry, FACTOR).to(tl.float64, bitcast=True)
    steps = (rate * scale * factor).to(WIDE)
    w, w_across, w_along = tiles.matrix(entries, count, entry, batch, W, W_TYPE, X_ORDER, ALIGNED)
    x, across, along = tiles.matrix(entries, count, entry, batch, X, X_TYPE, X_ORDER, ALIGNED)
    w = tiles.corner(w, w_across, w_along, first, 0, ALIGNED)
    x = tiles.corner(x, across, along, first, 0, ALIGNED)
    line = tl.arange(0, LINES)
    place = tl.arange(0, ALONG)
    w_at = tiles.square(line, place, w_across, w_along)
    x_at = tiles.square(line, place, across, along)
    for start in tl.range(0, length, ALONG):
        mask = (line < left)[:, None] & (place < length - start)[None, :]
        old = tl.load(w + w_at, mask=mask, other=0.0).to(WIDE)
        value = tl.load(x + x_at, mask=mask, other=0.0).to(WIDE)
        tl.store(w + w_at, (kept * old - steps[:, None] * value).to(W_TYPE), mask=mask)
        w += ALONG * w_along
        x += ALONG * along


def normuon_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    row_moments: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    beta2: float,
    norm_eps: float,
    coefficients: list[float],
    restarts: list[int],
    nesterov: bool = True,
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
) -> None:
    iteration = Iteration(coefficients, restarts, form, precision, scale, eps, safety)
    lists = (params, grads, momentum_buffers, row_moments)
    mine: list[int] = []
    rest: list[int] = []
    keys = iteration.keys(momentum_buffers)
    for i, (key, *matrices) in enumerate(zip(keys, *lists, strict=True)):
        wide = any(t.dtype == torch.float64 for t in matrices)
        (rest if wide or key is None else mine).append(i)
    if rest:
        some = ([tensors[i] for i in rest] for tensors in lists)
        numbers = (weight_decay, [factors[i] for i in rest], beta2, norm_eps)
        how = (coefficients, restarts, nesterov, *iteration[2:])
        ops.normuon_step_.definition(*some, lr, momentum, *numbers, *how)
    sizes = [momentum_buffers[i].numel() for i in mine]
    for part in tables.stretches(sizes, max((*sizes, ACCELERATOR_WORK))) if mine else ():
        weights, G, B, moments = ([tensors[i] for i in mine[part]] for tensors in lists)
        updates = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B]
        norms = muon_prologue_(G, B, updates, momentum, nesterov)
        sums = polars_(iteration, updates, norms)
        scales = [factors[i] for i in mine[part]]
        rates = (lr.to(sums.device), weight_decay.to(sums.device))
        update_(weights, updates, moments, sums, rates, (beta2, 1 - beta2, norm_eps), scales)


def polars_(iteration: Iteration, X: list[Tensor], norms: Tensor) -> Tensor:
    """Write X <- its polynomials; return sums of squares along rows, laid out by `ends`."""
    counts = [math.prod(x.shape[:-1]) * ends.slots(x.shape[-1]) for x in X]
    # slots that no tile begins in stay 0
    sums = torch.zeros(sum(counts), dtype=torch.float32, device=X[0].device)
    firsts = itertools.accumulate([0, *counts[:-1]])
    extras = [(ends.PLAIN[0], first) for first in firsts]
    iteration.run(X, Target(X, ends.squares(sums), extras), norms)
    return sums


def update_(
    params: list[Tensor], polars: list[Tensor], moments: list[Tensor], squares: Tensor,
    rates: tuple[Tensor, Tensor], numbers: tuple[float, ...], factors: list[float],
) -> None:  # fmt: skip
    """Write moments from sums of squares, then weights: three launches, one pass over matrices.

    `rates` are the learning rate and the weight decay.
    """
    device = params[0].device
    launches, sizes = lines.groups(
        params, polars, moments, columns=False, whole=True, slots=ends.slots,
        extras=[(tables.bits(f),) for f in factors],
    )  # fmt: skip
    scales = torch.empty(sizes.lines, dtype=torch.float64, device=device)
    for group in launches:
        table = group.entries.table(numbers, device)
        sums, whole = totals.memory(table, device)
        row_moments_kernel[(table.tiles,)](
            table.data, table.count, squares, scales, sums, table.steps, group.types[2],
            group.blocks[0], **lines.OPTIONS,
        )  # fmt: skip
        totals.write(table, len(numbers), sums, whole)
        normalized_update_kernel[(table.tiles,)](
            table.data, table.count, scales, whole, *rates, table.steps, *group.constants(0, 1),
            **lines.OPTIONS,
        )  # fmt: skip
