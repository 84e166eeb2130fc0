"""Exchanges of a bucket: all-to-alls of blocks to owners and back, or one all-gather of copies.

Everything travels as bytes, so that one collective carries any mix of dtypes. Each exchange is a
generator that yields once its collective has started. Its caller computes something else meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .agreement import reporting
from .plan import Bucket
from .spread import Travel

Tensors = list[list[Tensor]]  # a list per item, with a tensor per traveler


def to_owners(bucket: Bucket, blocks: Tensors) -> Travel[Tensors]:
    """Send blocks to the owners, and return whole tensors of the items that this rank owns."""
    me, ranks = bucket.ranks.rank, range(bucket.ranks.size)
    send = [
        b for owner in ranks for x, some in zip(bucket.items, blocks, strict=True)
        if x.owner == owner and x.sends(me) for b in some
    ]  # fmt: skip
    sent = [bucket.outbound(me, owner) for owner in ranks]
    received = [bucket.outbound(holder, me) for holder in ranks]
    buffer = yield from all_to_all(bucket, send, sent, received)
    whole = [
        [torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=buffer.device)
         for t in x.travelers] for x in bucket.owned(me)
    ]  # fmt: skip
    read(buffer, (t.block(w, holder) for holder in ranks
                  for x, some in zip(bucket.owned(me), whole, strict=True) if x.sends(holder)
                  for t, w in zip(x.travelers, some, strict=True)))  # fmt: skip
    return whole


def from_owners(bucket: Bucket, whole: Tensors, blocks: Tensors) -> Travel[None]:
    """Send whole tensors back from their owners, and write them into this rank's blocks."""
    me, ranks = bucket.ranks.rank, range(bucket.ranks.size)
    mine = [
        (t, w) for x, some in zip(bucket.owned(me), whole, strict=True)
        for t, w in zip(x.travelers, some, strict=True) if t.returns
    ]  # fmt: skip
    send = [t.block(w, holder) for holder in ranks for t, w in mine]
    sent = [bucket.inbound(me, holder) for holder in ranks]
    received = [bucket.inbound(owner, me) for owner in ranks]
    buffer = yield from all_to_all(bucket, send, sent, received)
    read(buffer, (b for owner in ranks
                  for x, some in zip(bucket.items, blocks, strict=True) if x.owner == owner
                  for t, b in zip(x.travelers, some, strict=True) if t.returns))  # fmt: skip


def as_bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def read(buffer: Tensor, tensors: Iterable[Tensor]) -> None:
    """Fill tensors one after the other. Bytes are copied, so offsets need no alignment."""
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
) -> Travel[Tensor]:
    """Return the bytes that this rank receives; `sent` and `received` count them by rank."""
    device = bucket.items[0].param.device
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    packed = torch.cat([empty, *map(as_bytes, tensors)])
    buffer = torch.empty(sum(received), dtype=torch.uint8, device=device)
    group = bucket.ranks.group
    with reporting(group):
        work = dist.all_to_all_single(buffer, packed, received, sent, group=group, async_op=True)
    yield
    with reporting(group):
        work.wait()
    return buffer


def all_gather(bucket: Bucket, tensors: Iterable[Tensor]) -> Travel[Tensor]:
    """Return (ranks, bytes): what every rank sends, padded to the most that any of them sends."""
    device, size = bucket.items[0].param.device, bucket.gathered
    packed = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *map(as_bytes, tensors)])
    assert packed.numel() == bucket.found(bucket.ranks.rank)  # `pad` would cut off the rest
    mine = F.pad(packed, (0, size - packed.numel()))
    everyone = torch.empty(bucket.ranks.size * size, dtype=torch.uint8, device=device)
    group = bucket.ranks.group
    # torch 2.13 has the new name and deprecates the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with reporting(group):
        work = gather(everyone, mine, group=group, async_op=True)
    yield
    with reporting(group):
        work.wait()
    return everyone.view(bucket.ranks.size, size)


def interleaved(travels: Iterable[Travel[None]]) -> None:
    """Run all exchanges, each starting while earlier ones are under way.

    When one waits for its collective, the next one's has been started. All ranks keep the same
    order.
    """
    waiting, active = list(travels), list[Travel[None]]()
    while waiting or active:
        active += [waiting.pop(0)] if waiting else []
        for travel in reversed(tuple(active)):
            if next(travel, active) is active:  # it has ended
                active.remove(travel)
