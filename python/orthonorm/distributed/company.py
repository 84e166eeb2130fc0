"""Ranks that hold the same whole parameters, as under DDP, and share the work of their steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..optim.tensors import Ranks, is_cut, is_distributed, meets_owner, mesh_places

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


def share_work(optimizer: MatrixOptimizer, group: dist.ProcessGroup | None = None) -> None:
    """Have ranks that hold copies of the parameters compute each direction once, at one of them.

    A call and no constructor key, as a process group is no setting that a state dict could hold.

    Under DDP every rank has all parameters and averaged gradients, and would run Newton-Schulz for
    all of them. Here each rank updates its momentum, the owner of a matrix computes its direction,
    an all-gather a bucket brings the directions to all, and every rank applies them with its decay.
    Ranks keep whole parameters and whole state, the same bits as without: checkpoints are those of
    one process, by any rank. (On GPUs whose kernels apply a direction before it is rounded, to the
    rounding of a direction.) Owners are balanced by the cost of Newton-Schulz.

    Shared are matrices of rules that state their direction from updates and state alone and iterate
    for it (Muon, NorMuon, AdaMuon, Scion's spectral norms, MuonEq, SWAN, HybridAuON, TrustRegion;
    PolarGrad and SteepestDescent of parameters that are no half type); what else a direction
    writes, as NorMuon's row moments, is gathered with it. All others are computed on every rank, as
    without: AdamW and the rules of single passes, Conda, SOAP, Shampoo and their like, whose
    parameters and state would have to travel, groups with `state_dtype` or `telemetry`, compiled
    steps.

    Parameters are plain tensors, or DTensors that are replicated over just these ranks. Gradients
    must be equal on all of them, as DDP makes them; before each step ranks compare what they are to
    update, as sharded ones do. With nonfinite="skip" or "error" what one finds, all do.

    Args:
        optimizer: one of `orthonorm.optim`, on every rank of the group. Copies of it and unpickled
            ones do not share until they are told to.
        group: the process group (None: all ranks). Of one rank: nothing is shared.

    Raises:
        TypeError: for other optimizers. ValueError: for a group without this rank.
    """
    if not hasattr(optimizer, "company"):
        raise TypeError(
            f"share_work: optimizer must be one of orthonorm.optim, got {type(optimizer).__name__}"
        )
    group = group or dist.distributed_c10d._get_default_group()
    rank, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    if rank < 0:
        raise ValueError(
            f"share_work: group must have rank {dist.get_rank()}, which calls, got ranks {ranks}"
        )
    places = tuple((i,) for i in range(len(ranks)))
    optimizer.company = Ranks(group, rank, (len(ranks),), places) if len(ranks) > 1 else None
    optimizer.plans, optimizer.met = {}, False


def shared(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> bool:
    """Whether the ranks of the optimizer's company, which all hold `p`, share its work."""
    if opt.company is None or group["rule"] != "matrix" or torch.compiler.is_compiling():
        return False
    if group["state_dtype"] or group["telemetry"] or opt.prepares:
        return False
    return opt.self_contained and opt.iterates(p, group) and held_by_all(opt.company, p)


def held_by_all(company: Ranks, p: Any) -> bool:
    if not is_distributed(p):
        return True
    ranks = dist.get_process_group_ranks(company.group)
    return not any(map(is_cut, p.placements)) and sorted(mesh_places(p.device_mesh)) == ranks


def owned(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> bool:
    """Whether a rank computes the direction of `p` for others."""
    return meets_owner(p, group) or (opt.company is not None and shared(opt, p, group))
