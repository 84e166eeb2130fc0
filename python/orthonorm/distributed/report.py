"""What a step sends: predicted from the plan, before any step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from ..optim.tensors import is_distributed, sharded_dims
from .agreement import communicates, exchanged, has_experts, scope
from .plan import Bucket
from .shards import new_plan
from .spread import Sums

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


class Communication(NamedTuple):
    """Of one rank and one step in which every parameter has a gradient.

    buckets: how many buckets of sharded matrices have owners, with two all-to-alls each.
    sent, received: bytes that this rank exchanges with others in them.
    summed: bytes of Gram matrices and what belongs to them in all-reduces, which a ring sends up to
        twice; of the next step, as rules may sum more at a refresh.
    local: parameters updated without communication.
    launches: collectives in all: all-to-alls, gathers of 8 bytes by which ranks agree (one a step,
        one a bucket whose whole update is at owners, and one where ranks decompose matrices of
        experts beside), sums of Gram matrices and the gather of
        a norm before them, and, with nonfinite="skip" or "error", reductions of one flag a
        parameter.
    work: this rank's share of the multiply-adds of Newton-Schulz; 1 / ranks is even.
    """

    buckets: int
    sent: int
    received: int
    summed: int
    local: int
    launches: int
    work: float

    def __str__(self) -> str:
        return (
            f"{self.sent} bytes sent and {self.received} received in {2 * self.buckets} "
            f"all-to-alls, {self.summed} bytes summed, {self.launches} collectives, "
            f"{self.local} parameters local, {self.work:.1%} of the work"
        )


def comm_report(optimizer: MatrixOptimizer) -> Communication:
    """Predicted bytes and collectives of a step on this rank; communicates nothing.

    Args:
        optimizer: one of `orthonorm.optim`; `print` shows the result as a sentence.
    """
    buckets, sent, received, summed, kept, launches = 0, 0, 0, 0, 0, 0
    mine, all_work = 0.0, 0.0
    scopes = set()
    for group in optimizer.param_groups:
        params = group["params"]
        scopes |= {scope(p) for p in params if communicates(optimizer, p, group)}
        launches += reductions(params, group)
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
            buckets += 1
            others = [r for r in ranks if r != rank]
            sent += sum(bucket.outbound(rank, r) + bucket.inbound(rank, r) for r in others)
            received += sum(bucket.outbound(r, rank) + bucket.inbound(r, rank) for r in others)
            launches += 2 if optimizer.on_shards(group) else 3
            mine += sum(x.cost for x in bucket.owned(rank))
            all_work += sum(x.cost for x in bucket.items)
    share = mine / all_work if all_work else 0.0
    return Communication(buckets, sent, received, summed, kept, launches + len(scopes), share)


def sums_of(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> list[Sums]:
    """What the next step sums of a bucket."""
    found = []
    for x in bucket.items:
        step = opt.state.get(x.param, {}).get("step", 0) + 1 if opt.counts_steps else 1
        sums = opt.sums(x.param, group, step)
        assert sums is not None
        found.append(sums)
    return found


def reductions(params: list[Any], group: dict[str, Any]) -> int:
    if group["nonfinite"] == "propagate":
        return 0
    groups: set[dist.ProcessGroup] = set()
    for p in params:
        if is_distributed(p):
            groups |= {p.device_mesh.get_group(dim) for dim in sharded_dims(p)}
    return len(groups)
