"""Which rank computes which matrix: buckets of sharded parameters and their owners."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim.tensors import Box, Ranks, ranks_of
from .spread import Spread

BUCKET = 2**27  # bytes of whole matrices a rank holds at a time; one parameter may be more


class Traveler(NamedTuple):
    """A tensor that is whole at its owner while it computes, and what each rank holds of it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    returns: bool = True  # whether the owner changes it

    def block(self, t: Tensor, rank: int) -> Tensor:
        """A rank's block of the whole tensor."""
        for dim, (start, length) in enumerate(self.boxes[rank]):
            t = t.narrow(dim, start, length)
        return t

    def bytes(self, rank: int) -> int:
        return math.prod(length for _, length in self.boxes[rank]) * self.dtype.itemsize

    @property
    def whole_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Item(NamedTuple):
    """A sharded parameter, and what of it travels."""

    param: Tensor
    travelers: tuple[Traveler, ...]
    replicas: tuple[Hashable, ...]  # ranks of equal entries hold a whole parameter together
    cost: float  # multiply-adds of one product with the short side, of all its matrices
    owner: int = 0
    spread: Spread | None = None  # in place of an owner: the ranks that sum its Gram matrix
    company: Ranks | None = None  # where all hold it whole: what the owner finds, all gather

    @property
    def ranks(self) -> Ranks:
        return self.company or ranks_of(self.param)

    def sends(self, holder: int) -> bool:
        """Whether the owner has its block from this holder, not from one with a copy."""
        return self.replicas[holder] == self.replicas[self.owner]


class Bucket(NamedTuple):
    """Parameters whose shards travel together."""

    ranks: Ranks
    items: tuple[Item, ...]

    @property
    def spread(self) -> Spread | None:
        return self.items[0].spread

    def owned(self, rank: int) -> list[Item]:
        return [x for x in self.items if x.owner == rank and self.spread is None]

    @property
    def copies(self) -> bool:
        return self.items[0].company is not None

    def found(self, owner: int) -> int:
        """Bytes that an owner of what all hold sends to each of the others."""
        return sum(t.whole_bytes for x in self.owned(owner) for t in x.travelers)

    @property
    def gathered(self) -> int:
        """Bytes of each rank in the gather of what owners have found: as many as of the most."""
        return max(map(self.found, range(self.ranks.size)))

    def outbound(self, holder: int, owner: int) -> int:
        """Bytes that a holder of blocks sends to an owner."""
        sent = [x for x in self.owned(owner) if x.sends(holder)]
        return sum(t.bytes(holder) for x in sent for t in x.travelers)

    def inbound(self, owner: int, holder: int) -> int:
        """Bytes that an owner sends back to a holder."""
        return sum(t.bytes(holder) for x in self.owned(owner) for t in x.travelers if t.returns)


def traveler(p: Any, ranks: Ranks, returns: bool = True) -> Traveler:
    """A tensor of the parameter's shape and placement."""
    boxes = ranks.boxes(p.shape, p.placements)
    return Traveler(tuple(p.shape), tuple(p.stride()), p.dtype, boxes, returns)


def state_traveler(
    dtype: torch.dtype, ranks: Ranks, shape: Sequence[int], placements: Sequence[Any]
) -> Traveler:
    """State of a matrix, placed as tensors.state_placements says."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    return Traveler(tuple(shape), tuple(strides), dtype, ranks.boxes(shape, placements))


def cost(pieces: list[Tensor]) -> float:
    """Newton-Schulz grows with short^2 x long."""
    return float(sum(x.numel() * min(x.shape[-2:]) for x in pieces))


def buckets(
    items: Iterable[Item], alike: Callable[[Tensor], Hashable], limit: int = BUCKET
) -> list[Bucket]:
    """Costly parameters first, so that those of a bucket are of a size and their owners balance.

    However large they are, a bucket has one for every rank: with fewer, some would wait for others.
    """
    kinds: dict[Hashable, list[Item]] = {}
    for item in items:
        p, spread = item.param, item.spread
        dtype = p.dtype if spread or item.company else None
        key = (item.ranks, alike(p), spread, dtype, item.company is not None)
        kinds.setdefault(key, []).append(item)
    found, loads = [], dict[Ranks, list[float]]()
    for kind in kinds.values():
        ranks, filled = kind[0].ranks, 0
        load = loads.setdefault(ranks, [0.0] * ranks.size)
        bucket: list[Item] = []
        for item in sorted(kind, key=lambda x: -x.cost):
            size = sum(t.whole_bytes for t in item.travelers)
            if len(bucket) >= ranks.size and filled + size > limit * ranks.size:
                found.append(Bucket(ranks, balanced(bucket, load)))
                bucket, filled = [], 0
            bucket.append(item)
            filled += size
        found.append(Bucket(ranks, balanced(bucket, load)))
    return found


def balanced(items: list[Item], loads: list[float]) -> tuple[Item, ...]:
    """Owners by longest processing time first: each to the rank with the least work so far.

    `loads` is the ranks' work in all buckets: it is added to, or what is over in each would always
    be the first rank's.
    """
    placed = []
    for item in items:
        owner = loads.index(min(loads))
        loads[owner] += item.cost
        placed.append(item._replace(owner=owner))
    return tuple(placed)
