"""The two all-to-alls of a bucket: blocks to owners, whole tensors back to blocks; or one gather.

Everything travels as bytes, so that one collective carries any mix of dtypes. All are generators
that yield where their collective is on its way: whoever drives them has something else computed
meanwhile.
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

Tensors = list[list[Tensor]]  # of every item, of every traveler


def to_owners(bucket: Bucket, blocks: Tensors) -> Travel[Tensors]:
    """Whole tensors of the items this rank owns, from the blocks of all."""
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
    """Write the blocks of every item from the whole tensors at its owner."""
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
) -> Travel[Tensor]:
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
    """What every rank sends, the bytes of a rank in a row: as many as of the one with the most."""
    device, size = bucket.items[0].param.device, bucket.gathered
    packed = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *map(as_bytes, tensors)])
    assert packed.numel() == bucket.found(bucket.ranks.rank)  # `pad` would cut what is more
    mine = F.pad(packed, (0, size - packed.numel()))
    everyone = torch.empty(bucket.ranks.size * size, dtype=torch.uint8, device=device)
    group = bucket.ranks.group
    # torch 2.13's name for what is deprecated there
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with reporting(group):
        work = gather(everyone, mine, group=group, async_op=True)
    yield
    with reporting(group):
        work.wait()
    return everyone.view(bucket.ranks.size, size)


def interleaved(travels: Iterable[Travel[None]]) -> None:
    """Run them all, one beginning while those before it are under way.

    Where one waits for its collective, that of the next has been started. All ranks do so in the
    same order.
    """
    waiting, active = list(travels), list[Travel[None]]()
    while waiting or active:
        active += [waiting.pop(0)] if waiting else []
        for travel in reversed(tuple(active)):
            if next(travel, active) is active:  # it has ended
                active.remove(travel)
