"""Polar factors of matrices that are cut along their long side, by sums of their Gram matrices.

The Gram form of Newton-Schulz iterates on n x n, n the short side. Every rank makes the Gram matrix
of its part, all compute the same polynomial of their sum and apply it to their parts: updates
travel nowhere. Half of every symmetric matrix is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops import apply, divide_each, gram_polynomial, magnitude
from ..ops import gram as gram_of
from ..ops.newton_schulz import frobenius
from ..ops.words import segments, triples_of
from ..optim.tensors import sharded_dims
from ..orthogonalize import choose
from ..polar import Polynomial
from .agreement import reporting
from .plan import Bucket, Item, Travel

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


def summed(opt: MatrixOptimizer, item: Item, group: dict[str, Any]) -> Item:
    """The item, told over which ranks to sum its Gram matrix where that is the way.

    It is for a matrix whose direction is its polar factor, of which less is sent so, and only with
    method="gram": every rank then iterates every matrix, which owners share out, and the bits are
    no longer those of one process.
    """
    p: Any = item.param
    polynomial = opt.polar_alone(p, group)
    if polynomial is None or polynomial.scale != "frobenius" or p.dim() != 2:
        return item
    dims = sharded_dims(p)
    if len(dims) != 1 or group["split"] is not None or group["heads"] is not None:
        return item
    long, n = p.shape[p.placements[dims[0]].dim], min(p.shape)
    if long == n or group["method"] != "gram":
        return item
    among, members = p.device_mesh.size(dims[0]), p.device_mesh.get_group(dims[0])
    size, sums = reduced_bytes(p, polynomial)
    both_ways = 2 * sums * size * (among - 1) / among  # a rank's, in a ring
    owned, ranks = item.travelers[0], range(len(item.replicas))
    to = sum(owned.bytes(r) for r in ranks[1:] if item.sends(r))
    back = sum(owned.bytes(r) for r in ranks[1:])
    if both_ways >= (to + back) / len(ranks):
        return item
    return item._replace(summed=members, sums=sums, reduced=sums * size)


def iterated_dtype(p: Any, polynomial: Polynomial) -> torch.dtype:
    """That in which one process would iterate a parameter."""
    like = torch.empty(1, dtype=p.dtype, device=p.device).expand(p.shape)
    triples = triples_of(polynomial.coefficients)
    return choose(like, triples, polynomial.restarts, "gram", polynomial.precision).dtype


def sum_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def reduced_bytes(p: Tensor, polynomial: Polynomial) -> tuple[int, int]:
    """(bytes of half a Gram matrix, how often one is summed in a step)."""
    h = -(-min(p.shape) // 2)
    sums = len(segments(triples_of(polynomial.coefficients), polynomial.restarts))
    return (2 * h * h + h) * sum_dtype(p).itemsize, sums


def directions(
    opt: MatrixOptimizer, bucket: Bucket, blocks: list[Tensor], group: dict[str, Any]
) -> Travel[None]:
    """Replace the updates in `blocks`, this rank's parts, by those of the polar factors."""
    polynomial = opt.polar_alone(bucket.items[0].param, group)
    ranks = bucket.summed
    assert polynomial is not None and ranks is not None
    norms = yield from whole_norms(blocks, ranks)
    parts = []
    for x, block, norm in zip(bucket.items, blocks, norms.unbind(), strict=True):
        dtype = iterated_dtype(x.param, polynomial)
        divisor = (polynomial.safety * norm.clamp(min=group["eps"])).reshape(1)
        y = divide_each(block, divisor, dtype) if block.numel() else block.to(dtype)
        parts.append(y.mT if short_last(x.param) else y)
    for segment in segments(triples_of(polynomial.coefficients), polynomial.restarts):
        flat = [number for triple in segment for number in triple]
        grams = yield from gram_sums(bucket, parts)
        for i, (y, R) in enumerate(zip(parts, grams, strict=True)):
            Q = gram_polynomial(R, flat).to(y.dtype)
            parts[i] = apply(y, Q, 0.0) if y.numel() else y
    for x, block, y in zip(bucket.items, blocks, parts, strict=True):
        block.copy_(y.mT if short_last(x.param) else y)


def short_last(p: Any) -> bool:
    """Whether rows are shared out, so that columns are the short side."""
    return bool(p.placements[sharded_dims(p)[0]].dim % 2 == 0)


def whole_norms(blocks: list[Tensor], ranks: dist.ProcessGroup) -> Travel[Tensor]:
    """|U|_F of the whole updates, the same bits on every rank, without overflow."""
    mine = torch.stack([magnitude([b]).sum() if b.numel() else b.new_zeros((), dtype=torch.float64)
                        for b in blocks])  # fmt: skip
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(ranks))]
    with reporting(ranks):
        work = dist.all_gather(everyone, mine, group=ranks, async_op=True)
    yield
    with reporting(ranks):
        work.wait()
    return frobenius(torch.stack(everyone, 1).unsqueeze(1)).flatten()


def gram_sums(bucket: Bucket, parts: list[Tensor]) -> Travel[list[Tensor]]:
    """Y Y^T of whole matrices, Y in `parts`; as gram_form has them, in float32 for bfloat16."""
    halves, ranks = [], bucket.summed
    assert ranks is not None
    for x, y in zip(bucket.items, parts, strict=True):
        wide = torch.float32 if y.dtype == torch.bfloat16 else y.dtype
        n = y.shape[0]
        R = gram_of(y.to(wide)) if y.numel() else y.new_zeros((n, n))
        halves.append(folded(R.to(sum_dtype(x.param))))
    packed = torch.cat(halves)
    with reporting(ranks):
        work = dist.all_reduce(packed, group=ranks, async_op=True)
    yield
    with reporting(ranks):
        work.wait()
    found = packed.split([h.numel() for h in halves])
    return [
        unfolded(half, y.shape[0]).to(torch.float32 if y.dtype == torch.bfloat16 else y.dtype)
        for half, y in zip(found, parts, strict=True)
    ]


def folded(A: Tensor) -> Tensor:
    """Half of a symmetric matrix: with h = n/2, triangles of two blocks as one, and the third."""
    h = -(-A.shape[0] // 2)
    A = F.pad(A, (0, A.shape[0] % 2, 0, A.shape[0] % 2))
    top, low, rest = A[:h, :h], A[h:, h:], A[h:, :h]
    both = F.pad(top.tril(), (0, 0, 1, 0)) + F.pad(low.triu(), (0, 0, 0, 1))
    return torch.cat([both.flatten(), rest.flatten()])


def unfolded(half: Tensor, n: int) -> Tensor:
    """The reverse of `folded`, symmetric bit for bit."""
    h = -(-n // 2)
    both, rest = half[: h * (h + 1)].view(h + 1, h), half[h * (h + 1) :].view(h, h)
    top, low = both[1:].tril(), both[:h].triu()
    top, low = top + top.tril(-1).mT, low + low.triu(1).mT
    return torch.cat([torch.cat([top, rest.mT], 1), torch.cat([rest, low], 1)])[:n, :n].contiguous()
