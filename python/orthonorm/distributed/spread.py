"""Matrices cut along their long side: ranks sum small matrices instead of sending these.

Every rank has a part of each matrix's long side. Norms, Gram matrices of the short side and small
state are summed over the ranks; of a symmetric matrix, half is sent. All else is local. Generators
yield once a collective has started; `finished` waits for their end.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops import apply, gram_polynomial, magnitude
from ..ops import gram as gram_of
from ..ops.normalize import accumulator
from ..ops.scaling import frobenius
from ..ops.words import Triples, segments
from .agreement import reporting

T = TypeVar("T")
Travel = Generator[None, None, T]  # yields once a collective has started


class Sums(NamedTuple):
    """Bytes of every all-reduce that a step needs for one matrix, and number of norm gathers."""

    bytes: tuple[int, ...]
    norms: int = 0


class Spread(NamedTuple):
    """The ranks that divide the long sides of matrices."""

    group: dist.ProcessGroup

    def sums(self, tensors: Sequence[Tensor]) -> Travel[list[Tensor]]:
        """Return the sums of tensors over the ranks: one all-reduce, in their common dtype."""
        packed = torch.cat([t.flatten() for t in tensors])
        with reporting(self.group):
            work = dist.all_reduce(packed, group=self.group, async_op=True)
        yield
        with reporting(self.group):
            work.wait()
        found = packed.split([t.numel() for t in tensors])
        return [x.view(t.shape) for x, t in zip(found, tensors, strict=True)]

    def symmetric(self, tensors: Sequence[Tensor]) -> Travel[list[Tensor]]:
        """Return the sums of symmetric matrices, of which half is sent."""
        halves = yield from self.sums([folded(A) for A in tensors])
        return [unfolded(h, A.shape[-1]) for h, A in zip(halves, tensors, strict=True)]

    def total(self, grams: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of symmetric matrices, each in its dtype, after waiting for them."""
        summed = finished(self.symmetric([A.to(accumulator(A)) for A in grams])) if grams else []
        return [T.to(A.dtype) for T, A in zip(summed, grams, strict=True)]

    def norms(self, parts: Sequence[Tensor]) -> Travel[Tensor]:
        """Return |X|_F of every whole matrix: the same bits on every rank, without overflow."""
        mine = torch.cat([magnitude([x]) if x.numel() else
                          x.new_zeros(x.shape[:-2].numel(), dtype=torch.float64)
                          for x in parts])  # fmt: skip
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        with reporting(self.group):
            work = dist.all_gather(everyone, mine, group=self.group, async_op=True)
        yield
        with reporting(self.group):
            work.wait()
        return frobenius(torch.stack(everyone, 1).unsqueeze(1)).flatten()

    def polynomial(
        self, parts: list[Tensor], triples: Triples, restarts: list[int], dtype: torch.dtype
    ) -> Travel[list[Tensor]]:
        """Return this rank's columns of f(X), by the Gram form of Newton-Schulz.

        `parts` are this rank's columns of every X. Every segment between restarts takes one sum,
        in `dtype`. Gram matrices of bfloat16 are made and iterated in float32, as in `gram_form`.
        """
        for segment in segments(triples, restarts):
            flat = [number for triple in segment for number in triple]
            wide = [torch.float32 if y.dtype == torch.bfloat16 else y.dtype for y in parts]
            grams = yield from self.symmetric(
                [part_gram(y.to(w)).to(dtype) for y, w in zip(parts, wide, strict=True)]
            )
            factors = [gram_polynomial(R.to(w), flat) for R, w in zip(grams, wide, strict=True)]
            parts = [
                apply(y, Q.to(y.dtype), 0.0) if y.numel() else y
                for y, Q in zip(parts, factors, strict=True)
            ]
        return parts


class Part(NamedTuple):
    """A rank's part of one matrix."""

    shape: tuple[int, ...]  # of the whole matrix
    box: tuple[tuple[int, int], ...]  # offset and length of the part in rows and columns
    block: Tensor
    state: dict[str, Tensor]  # `matrix_state`: whole tensors, zero outside this rank's block


def finished(travel: Travel[T]) -> T:
    """Run a generator to its end, waiting for its collectives, and return its result."""
    while True:
        try:
            next(travel)
        except StopIteration as end:
            return end.value


def part_gram(Y: Tensor) -> Tensor:
    """Return Y Y^T, or zeros if this rank has no column."""
    return gram_of(Y) if Y.numel() else Y.new_zeros((*Y.shape[:-1], Y.shape[-2]))


def folded_size(n: int) -> int:
    """Return how many numbers `folded` makes of an n x n matrix."""
    h = -(-n // 2)
    return 2 * h * h + h


def folded(A: Tensor) -> Tensor:
    """Return half of symmetric matrices (..., n, n), flattened to (..., folded_size(n)).

    With h = n/2 rounded up, the two diagonal blocks of h x h are symmetric. The lower triangle of
    one and the upper triangle of the other fill (h + 1) x h; the block below the diagonal follows.
    """
    n = A.shape[-1]
    h = -(-n // 2)
    A = F.pad(A, (0, n % 2, 0, n % 2))
    top, low, rest = A[..., :h, :h], A[..., h:, h:], A[..., h:, :h]
    both = F.pad(top.tril(), (0, 0, 1, 0)) + F.pad(low.triu(), (0, 0, 0, 1))
    return torch.cat([both.flatten(-2), rest.flatten(-2)], -1)


def unfolded(half: Tensor, n: int) -> Tensor:
    """Undo `folded`; the result is symmetric bit for bit."""
    h = -(-n // 2)
    both = half[..., : h * (h + 1)].unflatten(-1, (h + 1, h))
    rest = half[..., h * (h + 1) :].unflatten(-1, (h, h))
    top, low = both[..., 1:, :].tril(), both[..., :h, :].triu()
    top, low = top + top.tril(-1).mT, low + low.triu(1).mT
    rows = (torch.cat([top, rest.mT], -1), torch.cat([rest, low], -1))
    return torch.cat(rows, -2)[..., :n, :n].contiguous()
