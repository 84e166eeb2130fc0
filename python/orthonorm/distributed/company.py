"""Shared work: ranks that hold the same whole parameters, as under DDP, divide their steps."""

from __future__ import annotations

from itertools import compress
from operator import not_
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import PLAIN
from ..optim.tensors import Ranks, is_cut, is_distributed, meets_owner, mesh_places

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


def share_work(optimizer: MatrixOptimizer, group: dist.ProcessGroup | None = None) -> None:
    """Compute each direction once, at one of the ranks that hold copies of the parameters.

    This is a call and no constructor argument, because a state dict cannot hold a process group.

    Under DDP every rank has all parameters and averaged gradients, and would run Newton-Schulz for
    all of them. With shared work each rank still updates its momentum, but only the owner of a
    matrix computes its direction. One all-gather a bucket brings the directions to all ranks. Every
    rank then applies them with its decay. Owners are balanced by the cost of Newton-Schulz.

    Ranks keep whole parameters and whole state, with the same bits as without this call. So any
    rank can write the checkpoint, and it is that of one process. Some GPU kernels apply a direction
    before it is rounded; with these, results differ by the rounding of a direction.

    Shared are matrices of rules that iterate for a direction and make it from updates and state
    alone. These are Muon, NorMuon, AdaMuon, Scion's spectral norms, MuonEq, SWAN, HybridAuON and
    TrustRegion. PolarGrad and SteepestDescent (norm="linear") share parameters that are no half
    type. What else a direction writes, such as NorMuon's row moments, is gathered with it.

    Everything else is computed on every rank, as without this call. That is AdamW and the rules of
    single passes; Conda, SOAP, Shampoo and their like, whose parameters and state would have to
    travel; groups with `state_dtype` or `telemetry`; and compiled steps.

    Parameters are plain tensors, or DTensors that are replicated over just these ranks. Gradients
    must be equal on all of them, as DDP makes them. Before each step ranks compare what they are to
    update, as with sharded parameters. With nonfinite="skip" or "error", a gradient that is not
    finite on one rank counts as such on all.

    Args:
        optimizer: one of `orthonorm.optim`, on every rank of the group. Copies and unpickled
            optimizers share only after a call of their own.
        group: the process group (None: all ranks). A group of one rank shares nothing.

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
    """True if the ranks of `share_work` all hold `p` and share its work."""
    if opt.company is None or group["rule"] != "matrix" or torch.compiler.is_compiling():
        return False
    if group["state_dtype"] or group["telemetry"] or opt.prepares:
        return False
    return opt.self_contained and opt.iterates(p, group) and held_by_all(opt.company, p)


def held_by_all(company: Ranks, p: Any) -> bool:
    """True if `p` is whole on just the ranks of the company; plain tensors are taken to be."""
    if not is_distributed(p):
        return True
    ranks = dist.get_process_group_ranks(company.group)
    return not any(map(is_cut, p.placements)) and sorted(mesh_places(p.device_mesh)) == ranks


def owned(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> bool:
    """True if one rank computes the direction of `p` for others."""
    return meets_owner(p, group) or (opt.company is not None and shared(opt, p, group))


def owned_among(
    opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that are `owned`, and the others."""
    if opt.company is None and all(type(p) in PLAIN for p in params):
        return [], params
    flags = [owned(opt, p, group) for p in params]
    return list(compress(params, flags)), list(compress(params, map(not_, flags)))
