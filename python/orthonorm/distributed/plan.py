"""Plan of a step: buckets of parameters that travel together, and the owner of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim.tensors import Box, Ranks, ranks_of
from .spread import Spread

BUCKET = 2**27  # bytes of whole matrices a rank holds at a time; one parameter may exceed it


class Traveler(NamedTuple):
    """A tensor that is whole at its owner while that computes, and the block of each rank."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    returns: bool = True  # True if the owner changes it, and sends it back

    def block(self, t: Tensor, rank: int) -> Tensor:
        """Return a rank's block of the whole tensor, as a view."""
        for dim, (start, length) in enumerate(self.boxes[rank]):
            t = t.narrow(dim, start, length)
        return t

    def bytes(self, rank: int) -> int:
        return math.prod(length for _, length in self.boxes[rank]) * self.dtype.itemsize

    @property
    def whole_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Item(NamedTuple):
    """A parameter that is sharded or shared, and its tensors that travel."""

    param: Tensor
    travelers: tuple[Traveler, ...]
    replicas: tuple[Hashable, ...]  # ranks of equal entries hold a whole parameter together
    cost: float  # multiply-adds of one product with the short side, of all its matrices
    owner: int = 0
    spread: Spread | None = None  # if set: ranks sum its Gram matrix, it has no owner
    company: Ranks | None = None  # if set: all hold it whole, and gather directions

    @property
    def ranks(self) -> Ranks:
        return self.company or ranks_of(self.param)

    def sends(self, holder: int) -> bool:
        """True if this holder sends its block to the owner, not another with a copy of it."""
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
        """True if all ranks hold the parameters whole (`share_work`)."""
        return self.items[0].company is not None

    def found(self, owner: int) -> int:
        """Return the bytes that an owner in a bucket of copies sends to each other rank."""
        return sum(t.whole_bytes for x in self.owned(owner) for t in x.travelers)

    @property
    def gathered(self) -> int:
        """Bytes of each rank in the gather of a bucket of copies: the most that any owner sends."""
        return max(map(self.found, range(self.ranks.size)))

    def outbound(self, holder: int, owner: int) -> int:
        """Return the bytes that a holder of blocks sends to an owner."""
        sent = [x for x in self.owned(owner) if x.sends(holder)]
        return sum(t.bytes(holder) for x in sent for t in x.travelers)

    def inbound(self, owner: int, holder: int) -> int:
        """Return the bytes that an owner sends back to a holder."""
        return sum(t.bytes(holder) for x in self.owned(owner) for t in x.travelers if t.returns)


def traveler(p: Any, ranks: Ranks, returns: bool = True) -> Traveler:
    """Return a traveler of the parameter's shape, strides, dtype and placement."""
    boxes = ranks.boxes(p.shape, p.placements)
    return Traveler(tuple(p.shape), tuple(p.stride()), p.dtype, boxes, returns)


def state_traveler(
    dtype: torch.dtype, ranks: Ranks, shape: Sequence[int], placements: Sequence[Any]
) -> Traveler:
    """Return a traveler for state of a matrix, placed by tensors.state_placements."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    return Traveler(tuple(shape), tuple(strides), dtype, ranks.boxes(shape, placements))


def cost(pieces: list[Tensor]) -> float:
    """Return the sum of short^2 x long, to which Newton-Schulz's time is proportional."""
    return float(sum(x.numel() * min(x.shape[-2:]) for x in pieces))


def buckets(
    items: Iterable[Item], alike: Callable[[Tensor], Hashable], limit: int = BUCKET
) -> list[Bucket]:
    """Divide items into buckets of one kind each, with owners.

    Costly items come first, so that a bucket's items are of similar size and owners balance. A
    bucket is full at `limit` bytes per rank, but not before it has an item for every rank: with
    fewer, some ranks would wait for others. The last bucket of a kind may be smaller.
    """
    kinds: dict[Hashable, list[Item]] = {}
    for item in items:
        p, spread = item.param, item.spread
        dtype = p.dtype if spread or item.company else None
        key = (item.ranks, alike(p), spread, dtype, item.company is not None)
        kinds.setdefault(key, []).append(item)
    made, loads = [], dict[Ranks, list[float]]()
    for kind in kinds.values():
        ranks, filled = kind[0].ranks, 0
        load = loads.setdefault(ranks, [0.0] * ranks.size)
        bucket: list[Item] = []
        for item in sorted(kind, key=lambda x: -x.cost):
            size = sum(t.whole_bytes for t in item.travelers)
            if len(bucket) >= ranks.size and filled + size > limit * ranks.size:
                made.append(Bucket(ranks, balanced(bucket, load)))
                bucket, filled = [], 0
            bucket.append(item)
            filled += size
        made.append(Bucket(ranks, balanced(bucket, load)))
    return made


def balanced(items: list[Item], loads: list[float]) -> tuple[Item, ...]:
    """Give each item, costly ones first, to the rank with the least work so far.

    `loads` is the work of each rank in all buckets so far; it is updated. Balancing each bucket on
    its own would always give the surplus to the first rank.
    """
    placed = []
    for item in items:
        owner = loads.index(min(loads))
        loads[owner] += item.cost
        placed.append(item._replace(owner=owner))
    return tuple(placed)
