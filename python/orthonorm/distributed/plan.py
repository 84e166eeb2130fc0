"""Which rank computes which matrix: buckets of sharded parameters and their owners."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim.tensors import Ranks, ranks_of, shard_dim

BUCKET = 2**28  # bytes of whole matrices a rank holds at a time; one parameter may be more


class Traveler(NamedTuple):
    """A tensor cut into blocks along `dim` that is whole at its owner while it computes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    dim: int

    def bounds(self, ranks: Ranks, rank: int) -> tuple[int, int, int]:
        return (self.dim, *ranks.block(self.shape[self.dim], rank))

    def block(self, ranks: Ranks, rank: int) -> tuple[int, ...]:
        """The shape of a rank's block."""
        dim, _, length = self.bounds(ranks, rank)
        return (*self.shape[:dim], length, *self.shape[dim + 1 :])

    def bytes(self, ranks: Ranks, rank: int) -> int:
        return math.prod(self.block(ranks, rank)) * self.dtype.itemsize


class Item(NamedTuple):
    """A sharded parameter: its update first, then the state that `direction` reads and writes."""

    param: Tensor
    travelers: tuple[Traveler, ...]
    cost: float  # multiply-adds of one product with the short side, of all its matrices
    owner: int = 0


class Bucket(NamedTuple):
    """Parameters whose shards travel together."""

    ranks: Ranks
    items: tuple[Item, ...]

    def owned(self, rank: int) -> list[Item]:
        return [x for x in self.items if x.owner == rank]

    def bytes(self, holder: int, owner: int) -> int:
        """What travels between the holder of blocks and an owner, in either direction."""
        return sum(t.bytes(self.ranks, holder) for x in self.owned(owner) for t in x.travelers)


def traveler(p: Any) -> Traveler:
    """A tensor of the parameter's shape and placement."""
    return Traveler(tuple(p.shape), tuple(p.stride()), p.dtype, shard_dim(p))


def state_traveler(p: Tensor, shape: Sequence[int]) -> Traveler:
    """State of a matrix, sharded along dim 0 (tensors.state_zeros)."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    return Traveler(tuple(shape), tuple(strides), p.dtype, 0)


def cost(pieces: list[Tensor]) -> float:
    """Newton-Schulz grows with short^2 x long."""
    return float(sum(x.numel() * min(x.shape[-2:]) for x in pieces))


def buckets(
    items: list[Item], alike: Callable[[Tensor], Hashable], limit: int = BUCKET
) -> list[Bucket]:
    """Costly parameters first, so that those of a bucket are of a size and their owners balance."""
    kinds: dict[Hashable, list[Item]] = {}
    for item in items:
        kinds.setdefault((ranks_of(item.param), alike(item.param)), []).append(item)
    found = []
    for kind in kinds.values():
        ranks, filled = ranks_of(kind[0].param), 0
        bucket: list[Item] = []
        for item in sorted(kind, key=lambda x: -x.cost):
            size = sum(math.prod(t.shape) * t.dtype.itemsize for t in item.travelers)
            if bucket and filled + size > limit * ranks.size:
                found.append(Bucket(ranks, balanced(bucket, ranks.size)))
                bucket, filled = [], 0
            bucket.append(item)
            filled += size
        found.append(Bucket(ranks, balanced(bucket, ranks.size)))
    return found


def balanced(items: list[Item], ranks: int) -> tuple[Item, ...]:
    """Owners by longest processing time first: each to the rank with the least work so far."""
    loads = [0.0] * ranks
    placed = []
    for item in items:
        owner = loads.index(min(loads))
        loads[owner] += item.cost
        placed.append(item._replace(owner=owner))
    return tuple(placed)
