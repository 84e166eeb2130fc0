"""What a step sends: predicted from the plan, before any step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from ..optim.tensors import is_distributed, meets_owner, sharded_dims
from .agreement import communicates, scope
from .shards import new_plan

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


class Communication(NamedTuple):
    """Of one rank and one step in which every parameter has a gradient.

    buckets: how many buckets of sharded matrices there are, with two all-to-alls each.
    exchanged: bytes this rank sends to others in them; it receives as many.
    local: parameters updated without communication.
    launches: collectives in all: all-to-alls, gathers of 8 bytes by which ranks agree, and, with
        nonfinite="skip" or "error", reductions of one flag a parameter.
    work: this rank's share of the multiply-adds of Newton-Schulz; 1 / ranks is even.
    """

    buckets: int
    exchanged: int
    local: int
    launches: int
    work: float

    def __str__(self) -> str:
        return (
            f"{self.exchanged} bytes in {2 * self.buckets} all-to-alls, {self.launches} "
            f"collectives, {self.local} parameters local, {self.work:.1%} of the work"
        )


def comm_report(optimizer: MatrixOptimizer) -> Communication:
    """Predicted bytes and collectives of a step on this rank; communicates nothing.

    Args:
        optimizer: one of `orthonorm.optim`; `print` shows the result as a sentence.
    """
    buckets, exchanged, kept, launches = 0, 0, 0, 0
    mine, all_work = 0.0, 0.0
    scopes = set()
    for group in optimizer.param_groups:
        params = group["params"]
        scopes |= {scope(p) for p in params if communicates(optimizer, p, group)}
        launches += reductions(params, group)
        matrix = group["rule"] == "matrix" and not optimizer.elementwise
        cut = [p for p in params if p.numel() > 0 and matrix and meets_owner(p, group)]
        kept += len(params) - len(cut)
        for bucket in new_plan(optimizer, cut, group):
            rank, ranks = bucket.ranks.rank, range(bucket.ranks.size)
            buckets += 1
            others = [r for r in ranks if r != rank]
            exchanged += sum(bucket.bytes(rank, r) + bucket.bytes(r, rank) for r in others)
            mine += sum(x.cost for x in bucket.owned(rank))
            all_work += sum(x.cost for x in bucket.items)
    share = mine / all_work if all_work else 0.0
    return Communication(buckets, exchanged, kept, launches + 2 * buckets + len(scopes), share)


def reductions(params: list[Any], group: dict[str, Any]) -> int:
    if group["nonfinite"] == "propagate":
        return 0
    groups: set[dist.ProcessGroup] = set()
    for p in params:
        if is_distributed(p):
            groups |= {p.device_mesh.get_group(dim) for dim in sharded_dims(p)}
    return len(groups)
