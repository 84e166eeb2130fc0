"""The two all-to-alls of a bucket: blocks to owners, whole tensors back to blocks.

Everything travels as bytes, so that one collective carries any mix of dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.tensors import Ranks
from .agreement import reporting
from .plan import Bucket, Traveler

Tensors = list[list[Tensor]]  # of every item, of every traveler


def to_owners(bucket: Bucket, blocks: Tensors) -> Tensors:
    """Whole tensors of the items this rank owns, from the blocks of all."""
    ranks = bucket.ranks
    send = [
        b for owner in range(ranks.size) for x, some in zip(bucket.items, blocks, strict=True)
        if x.owner == owner for b in some
    ]  # fmt: skip
    mine = [t for x in bucket.owned(ranks.rank) for t in x.travelers]
    sent = [bucket.bytes(ranks.rank, owner) for owner in range(ranks.size)]
    received = [bucket.bytes(holder, ranks.rank) for holder in range(ranks.size)]
    buffer = all_to_all(bucket, send, sent, received)
    device = buffer.device
    whole = [torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=device) for t in mine]
    read(buffer, (block(w, t, ranks, r) for r in range(ranks.size)
                  for t, w in zip(mine, whole, strict=True)))  # fmt: skip
    found = iter(whole)
    return [[next(found) for _ in x.travelers] for x in bucket.owned(ranks.rank)]


def from_owners(bucket: Bucket, whole: Tensors, blocks: Tensors) -> None:
    """Write the blocks of every item from the whole tensors at its owner."""
    ranks = bucket.ranks
    mine = [
        (t, w) for x, some in zip(bucket.owned(ranks.rank), whole, strict=True)
        for t, w in zip(x.travelers, some, strict=True)
    ]  # fmt: skip
    send = [block(w, t, ranks, holder) for holder in range(ranks.size) for t, w in mine]
    sent = [bucket.bytes(holder, ranks.rank) for holder in range(ranks.size)]
    received = [bucket.bytes(ranks.rank, owner) for owner in range(ranks.size)]
    buffer = all_to_all(bucket, send, sent, received)
    read(buffer, (b for owner in range(ranks.size)
                  for x, some in zip(bucket.items, blocks, strict=True)
                  if x.owner == owner for b in some))  # fmt: skip


def block(t: Tensor, traveler: Traveler, ranks: Ranks, rank: int) -> Tensor:
    return t.narrow(*traveler.bounds(ranks, rank))


def as_bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def read(buffer: Tensor, tensors: Iterable[Tensor]) -> None:
    """Fill tensors one after the other; bytes are copied, so no offset need be aligned."""
    start = 0
    for t in tensors:
        dense = t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        data = as_bytes(dense)
        data.copy_(buffer[start : start + data.numel()])
        if dense is not t:
            t.copy_(dense)
        start += data.numel()


def all_to_all(
    bucket: Bucket, tensors: Sequence[Tensor], sent: list[int], received: list[int]
) -> Tensor:
    device = bucket.items[0].param.device
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    packed = torch.cat([empty, *map(as_bytes, tensors)])
    buffer = torch.empty(sum(received), dtype=torch.uint8, device=device)
    group = bucket.ranks.group
    with reporting(group):
        dist.all_to_all_single(buffer, packed, received, sent, group=group)
    return buffer
