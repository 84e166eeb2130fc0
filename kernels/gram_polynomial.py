"""Polynomials of small Gram matrices in one launch, one program per matrix.

Iterations on a short side that the table serves then take three launches, whatever the long side:
X X^T, this polynomial, and Q X. Up to SIDE all matrices stay in registers. Q, R, Z and W of
128 x 128 do not fit: compiled for sm_90 they spill. (168 to 1612 instructions with 8 and 16 warps;
in blocks of 64 x 64, 227; ptxas of Triton 3.9, 2026-11.) Larger ones lie in the second-level cache,
5 n^2 numbers. A program takes tiles of 128 of them through shared memory, one product after the
other.

The table's `torch_from` limits the side served. It looks at the shape of one matrix alone, so that
results do not depend on company. By arithmetic (H100, five iterations, 17 products; 2026-11) a tile
takes 0.8 us of latency and 6.6 ns for each of its n terms, and a launch in a graph takes 3 us. At
n = 128 one program takes 28 us, launches take 79. At n = 256 one program takes 127 us, launches
take 93 for one matrix and 178 for 132. Outside of graphs the host's time decides. Each launch took
34 us of it, and this one 51, before `iterations.py` planned them (measured; 2026-11).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from orthonorm import ops
from orthonorm._library import LOADED
from orthonorm.ops.words import CLUSTER, Triple, Triples, triples_of
from torch import Tensor

from . import configs, ends, tables, tiles
from .configs import FUSION, Config
from .product import Factors, Launch, launches, served, start
from .small_newton_schulz import HALF, block
from .tables import Entry, View, dense

SIDE = 64


@triton.jit
def symmetric_sum(x, y, z, alpha, beta, lower):
    """Return beta x + alpha y z, rounded to their type, with its lower triangle on both sides."""
    value = (beta * x.to(tl.float32) + alpha * tl.dot(y, z)).to(x.dtype)
    return tl.where(lower, value, tl.trans(value))


@triton.jit(do_not_specialize=["n", "iterations"])
def polynomial_kernel(
    R, out, coefficients, n, iterations, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """Write out <- Q, which starts as I.

    An iteration: Z = b R + c R^2;  Q <- a Q + Q Z;  W = a R + R Z;  R <- a W + W Z.
    """
    first = tl.program_id(0).to(tl.int64) * n * n
    i = tl.arange(0, BLOCK)
    at = tiles.square(i, i, n, 1)
    mask = (i < n)[:, None] & (i < n)[None, :]
    lower = i[:, None] >= i[None, :]
    r = tl.load(R + first + at, mask=mask, other=0.0)
    q = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(TYPE)
    for t in tl.range(0, iterations):
        a = tiles.number(coefficients, 3 * t).to(tl.float32)
        b = tiles.number(coefficients, 3 * t + 1).to(tl.float32)
        if SQUARE:
            c = tiles.number(coefficients, 3 * t + 2).to(tl.float32)
            z = symmetric_sum(r, r, r, c, b, lower)
            b = 1.0
        else:
            z = r
        q = symmetric_sum(q, q, z, b, a, lower)
        w = symmetric_sum(r, r, z, b, a, lower)
        r = symmetric_sum(w, w, z, b, a, lower)
    tl.store(out + first + at, q, mask=mask)


@triton.jit
def tile_of(A, B, i, j, rows, columns, inner, n, depth, gamma):
    """Return the tile of gamma I + A B at (i, j) in float32, with `depth` terms of every sum."""
    a = tl.multiple_of(A + i * n, 16) + tiles.square(rows, inner, n, 1)
    b = tl.multiple_of(B + j, 16) + tiles.square(inner, columns, n, 1)
    acc = tl.where((rows + i)[:, None] == (columns + j)[None, :], gamma, 0.0)
    for k in tl.range(0, depth, inner.shape[0]):
        left = (inner < n - k)[None, :] & (rows < n - i)[:, None]
        x = tl.load(a, mask=left, other=0.0)
        above = (inner < n - k)[:, None] & (columns < n - j)[None, :]
        y = tl.load(b, mask=above, other=0.0)
        acc = tl.dot(x, y, acc)
        a += inner.shape[0]
        b += inner.shape[0] * n
    return acc


@triton.jit
def matrix_of(entries, steps, step, which, skip, TYPE: tl.constexpr):
    """Return the address of this program's matrix in the batch whose address is field `which`."""
    address = tiles.field(entries, steps, step, which).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address + skip, 16)


@triton.jit(do_not_specialize=["n", "steps"])
def chain_kernel(
    entries, steps, n, TYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Write the steps in order, each out <- alpha (A B + gamma I) + beta C.

    A step computes the lower triangle of tiles and mirrors it. It reads nothing of its out. n is a
    multiple of 8, and a field too.
    """
    skip = tl.program_id(0).to(tl.int64) * n * n
    down = tl.cdiv(n, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    for step in tl.range(0, steps):
        depth = tiles.field(entries, steps, step, 1).to(tl.int32)
        alpha = tiles.field(entries, steps, step, 2).to(tl.float64, bitcast=True).to(tl.float32)
        beta = tiles.field(entries, steps, step, 3).to(tl.float64, bitcast=True).to(tl.float32)
        gamma = tiles.field(entries, steps, step, 4).to(tl.float64, bitcast=True).to(tl.float32)
        out = matrix_of(entries, steps, step, 5, skip, TYPE)
        C = matrix_of(entries, steps, step, 6, skip, TYPE)
        A = matrix_of(entries, steps, step, 7, skip, TYPE)
        B = matrix_of(entries, steps, step, 8, skip, TYPE)
        for tile in tl.range(0, down * (down + 1) // 2):
            # n is read anew per tile: else offsets take registers through all steps (112 spills)
            n = tl.load(entries + 9 * steps + step, volatile=True).to(tl.int32) // 8 * 8
            row, column = tiles.triangle(tl.cast(tile, tl.int64))
            i = row.to(tl.int32) * BLOCK_M
            j = column.to(tl.int32) * BLOCK_M
            acc = alpha * tile_of(A, B, i, j, rows, columns, inner, n, depth, gamma)
            mask = (rows < n - i)[:, None] & (columns < n - j)[None, :]
            at = tl.multiple_of(i * n + j, 8) + tiles.square(rows, columns, n, 1)
            acc += beta * tl.load(C + at, mask=mask, other=0.0).to(tl.float32)
            mirror = tl.trans(acc)
            if row == column:
                acc = tl.where(rows[:, None] >= columns[None, :], acc, mirror)
            else:
                across = tl.multiple_of(j * n + i, 8) + tiles.square(columns, rows, n, 1)
                opposite = (columns < n - j)[:, None] & (rows < n - i)[None, :]
                tl.store(out + across, mirror.to(TYPE), mask=opposite)
            tl.store(out + at, acc.to(TYPE), mask=mask)
        tl.debug_barrier()  # the next step reads what this one wrote


def schedule(
    R: int, out: int, buffers: Sequence[int], n: int, triples: Iterable[tuple[float, ...]]
) -> list[Entry]:
    """Return steps of `chain_kernel` that write `ops.gram_polynomial` of R to out.

    R, out and the four buffers are addresses.
    """
    steps: list[Entry] = []

    def fresh(*live: int) -> int:
        return next(b for b in buffers if b not in live)

    def step(
        to: int, C: int, beta: float, A: int = 0, B: int = 0, alpha: float = 1.0, gamma: float = 0.0
    ) -> int:
        depth = n if A else 0
        steps.append((1, depth, *map(tables.bits, (alpha, beta, gamma)), to, C, A, B, n))
        return to

    r, q, triples = R, 0, tuple(triples)
    for t, (a, b, c) in enumerate(triples):
        z, factor = (step(fresh(r, q), r, b, r, r, c), 1.0) if c else (r, b)
        to = out if t + 1 == len(triples) else fresh(r, q, z)
        q = step(to, q, a, q, z, factor) if q else step(to, z, factor, gamma=a)
        if to != out:
            w = step(fresh(r, z, q), r, a, r, z, factor)
            r = step(fresh(w, z, q), w, a, w, z, factor)
    return steps


@tables.kept
def scheduled(
    R: int, out: int, buffers: tuple[int, ...], n: int, triples: tuple[tuple[float, ...], ...]
) -> tables.Entries:
    return tables.Entries(schedule(R, out, buffers, n, triples))


def chain(R: Tensor, triples: Triples, record: Config) -> Tensor:
    """Return `gram_polynomial` of R by `chain_kernel`, with n padded to the next multiple of 8."""
    n = R.shape[-1]
    side = tables.cdiv(n, 8) * 8
    if n < side or R.data_ptr() % 16 or not R.is_contiguous():
        given, R = R, R.new_zeros(*R.shape[:-2], side, side)
        R[..., :n, :n] = given
    out = torch.empty_like(R)
    buffers = R.new_empty(4, *R.shape)
    places = (R.data_ptr(), out.data_ptr(), tuple(b.data_ptr() for b in buffers))
    table = scheduled(*places, side, tuple(triples)).table((), R.device)
    chain_kernel[(R.numel() // side**2,)](
        table.data, table.count, side, tables.TYPES[R.dtype], record.block_m, record.block_k,
        **record.options,
    )  # fmt: skip
    return out[..., :n, :n].contiguous()


# ---- launches for each product -------------------------------------------------------------------


class Step(NamedTuple):
    """A symmetric product: alpha A B + beta C, plus more[0] B + more[1] I if there are `more`."""

    launches: list[Launch]
    alpha: float
    beta: float
    more: tuple[float, ...]


class Factor(NamedTuple):
    """The factors alpha Q + delta I; Q is the address of a stack."""

    Q: int
    alpha: float = 1.0
    delta: float = 0.0


@tables.kept
def symmetric(
    A: View, B: View, C: View, out: View, device: torch.device, precision: str
) -> list[Launch]:
    """Return launches of a symmetric product A B that adds C, or C and B."""
    products = (Factors(A, B, C, B, out),)
    return launches("symmetric", products, device, A.dtype, precision, symmetric=True)


@tables.kept
def chained(
    R: int, buffers: tuple[int, ...], count: int, n: int, dtype: torch.dtype,
    triples: tuple[Triple, ...], device: torch.device, precision: str,
) -> tuple[list[Step], Factor]:  # fmt: skip
    """Return steps that compute `ops.gram_polynomial` of the stack at R, and their result.

    They use four buffers, of which R may be one. The first Q = z Z + a I is not formed. The second
    iteration makes its Q by one product with three addends, rounded once:
    z z' Z Z' + a' z Z + z' a Z' + a a' I. If there is no second one, the product with X adds a I.
    """
    steps: list[Step] = []

    def step(
        live: Iterable[int], A: int, B: int, C: int, alpha: float, beta: float,
        more: tuple[float, ...] = (),
    ) -> int:  # fmt: skip
        out = next(b for b in buffers if b not in live)
        places = (dense(dtype, count, n, n, address) for address in (A, B, C, out))
        steps.append(Step(symmetric(*places, device, precision), alpha, beta, more))
        return out

    Q: Factor | None = None
    for t, (a, b, c) in enumerate(triples):
        old = () if Q is None else (Q.Q,)
        Z, z = (step((R, *old), R, R, R, c, b), 1.0) if c else (R, b)
        if Q is None:
            Q = Factor(Z, z, a)
        else:
            more = (z * Q.delta, a * Q.delta) if Q.delta else ()
            Q = Factor(step((R, Z, *old), Q.Q, Z, Q.Q, z * Q.alpha, a * Q.alpha, more))
        if t + 1 < len(triples):
            W = step((R, Z, Q.Q), R, Z, R, z, a)
            R = step((W, Z, Q.Q), W, Z, W, z, a)
    assert Q is not None
    return steps, Q


def run(steps: Iterable[Step], device: torch.device) -> None:
    """Launch the steps in order."""
    for some, alpha, beta, more in steps:
        start(some, device, alpha, beta, ends.STORE, True, more)


def alone(dtype: torch.dtype, n: int, device: torch.device) -> bool:
    """True if one launch serves such Gram matrices, or may: the CUDA library's, on clusters."""
    arch, _ = configs.device_of(device)
    cuda = ("gram_polynomial", "CUDA") in LOADED.parts and n <= CLUSTER
    return dtype in HALF and (n <= SIDE or cuda or bool(configs.records("chain", dtype, arch, n)))


def by_products(R: Tensor, triples: Triples) -> Tensor:
    """Return `gram_polynomial` of R by a launch for each product."""
    R = R.contiguous()
    n, count = R.shape[-1], R.shape[:-2].numel()
    stride = tables.cdiv(R.numel(), 128) * 128
    memory = R.new_empty(4, stride)
    addresses = tuple(m.data_ptr() for m in memory)
    how = (R.dtype, tuple(triples), R.device, configs.precision(R.dtype))
    steps, Q = chained(R.data_ptr(), addresses, count, n, *how)
    run(steps, R.device)
    return memory[addresses.index(Q.Q), : R.numel()].view(R.shape)


def gram_polynomial(R: Tensor, coefficients: list[float]) -> Tensor:
    triples, n = triples_of(coefficients), R.shape[-1]
    if R.numel() == 0 or not served("symmetric", R.dtype, R):
        return ops.gram_polynomial.definition(R, coefficients)
    if n > SIDE or R.dtype not in HALF:
        arch, _ = configs.device_of(R.device)
        if records := configs.records("chain", R.dtype, arch, n):
            return chain(R, triples, records[0])
        if len(triples) > 1:
            return by_products(R, triples)
        return ops.gram_polynomial.definition(R, coefficients)
    R, out = R.contiguous(), torch.empty_like(R, memory_format=torch.contiguous_format)
    numbers = tables.upload(tuple(map(tables.bits, coefficients)), R.device)
    polynomial_kernel[(R.numel() // (n * n),)](
        R, out, numbers, n, len(coefficients) // 3, tables.TYPES[R.dtype], block(n),
        any(coefficients[2::3]), num_warps=warps(block(n)), num_stages=1, **FUSION,
    )  # fmt: skip
    return out


def warps(side: int) -> int:
    """Return the warps of one program, enough that its matrices stay in registers."""
    return max(1, side**2 // 512)
