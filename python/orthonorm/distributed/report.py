"""Bytes and collectives of a step, predicted from the plan before any step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .agreement import communicates, exchanged, has_experts, holders, listed_company, scope
from .plan import Bucket
from .shards import new_plan
from .spread import Sums

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


class Communication(NamedTuple):
    """Communication of one rank in one step in which every parameter has a gradient.

    buckets: number of buckets of sharded matrices with owners; each takes two all-to-alls.
    sent, received: bytes that this rank exchanges with other ranks in these and in `gathers`.
    summed: bytes of all-reduces of Gram matrices and of state that is summed with them. A ring
        sends them up to twice. They are those of the next step: a refresh may sum more.
    local: number of parameters that no bucket of either kind steps.
    launches: number of all collectives. These are the all-to-alls and all-gathers of buckets, and
        sums of Gram matrices with the gather of a norm before them. Gathers of 8 bytes let ranks
        agree: one a step for every process group that must agree, one for every bucket whose whole
        update is at owners, and one per param group in which ranks also decompose matrices of their
        own experts. With nonfinite="skip" or "error", flags of parameters are reduced, once for
        every process group.
    work: this rank's share of the multiply-adds of Newton-Schulz that owners divide; 1 / ranks is
        an even share.
    gathers: number of buckets of parameters that all ranks hold (`share_work`). Each takes one
        all-gather, in which every rank sends as many bytes as the one that sends most.
    """

    buckets: int
    sent: int
    received: int
    summed: int
    local: int
    launches: int
    work: float
    gathers: int = 0

    def __str__(self) -> str:
        return (
            f"{self.sent} bytes sent and {self.received} received in {2 * self.buckets} "
            f"all-to-alls and {self.gathers} all-gathers, {self.summed} bytes summed, "
            f"{self.launches} collectives, {self.local} parameters local, "
            f"{self.work:.1%} of the work"
        )


def comm_report(optimizer: MatrixOptimizer) -> Communication:
    """Predict bytes and collectives of a step on this rank, without communication.

    Args:
        optimizer: one of `orthonorm.optim`; `print` shows the result as a sentence.
    """
    buckets, sent, received, summed, kept, launches = 0, 0, 0, 0, 0, 0
    mine, all_work, gathers = 0.0, 0.0, 0
    scopes = {*listed_company(optimizer)}
    for group in optimizer.param_groups:
        params = group["params"]
        scopes |= {scope(optimizer, p) for p in params if communicates(optimizer, p, group)}
        launches += reductions(optimizer, group)
        cut = [p for p in params if exchanged(optimizer, p, group)]
        kept += len(params) - len(cut)
        launches += bool(cut) and has_experts(optimizer, group)
        for bucket in new_plan(optimizer, cut, group):
            rank, ranks = bucket.ranks.rank, range(bucket.ranks.size)
            if bucket.spread is not None:
                found = sums_of(optimizer, bucket, group)
                summed += sum(sum(x.bytes) for x in found)
                launches += max(len(x.bytes) + x.norms for x in found)
                continue
            mine += sum(x.cost for x in bucket.owned(rank))
            all_work += sum(x.cost for x in bucket.items)
            others = [r for r in ranks if r != rank]
            if bucket.copies:
                gathers += 1
                sent += len(others) * bucket.gathered
                received += len(others) * bucket.gathered
                launches += 1
                continue
            buckets += 1
            sent += sum(bucket.outbound(rank, r) + bucket.inbound(rank, r) for r in others)
            received += sum(bucket.outbound(r, rank) + bucket.inbound(r, rank) for r in others)
            launches += 2 if optimizer.on_shards(group) else 3
    share = mine / all_work if all_work else 0.0
    launches += len(scopes)
    return Communication(buckets, sent, received, summed, kept, launches, share, gathers)


def sums_of(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> list[Sums]:
    """Return what the next step sums of every item of a bucket."""
    found = []
    for x in bucket.items:
        step = opt.state.get(x.param, {}).get("step", 0) + 1 if opt.counts_steps else 1
        sums = opt.sums(x.param, group, step)
        assert sums is not None
        found.append(sums)
    return found


def reductions(opt: MatrixOptimizer, group: dict[str, Any]) -> int:
    """Return the number of all-reduces by which ranks judge gradients in a param group."""
    if group["nonfinite"] == "propagate":
        return 0
    return len({who for p in group["params"] for who in holders(opt, p, group)})
