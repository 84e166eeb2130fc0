"""Ranks that are about to exchange updates agree on what they exchange, or all raise."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.tensors import Ranks, is_distributed, meets_owner, ranks_of, sharded_dims
from .company import owned, shared
from .hosts import hosts_of, in_order
from .meeting import describe, meet

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer

T = TypeVar("T")
ANSWER = 5.0  # seconds for a rank to say that it lives, once an exchange has failed
Work = list[tuple[dict[str, Any], list[int]]]  # groups, with the indices that have gradients


class Listed(NamedTuple):
    """What a rank is to update together with others, or why it cannot."""

    device: torch.device
    entries: list[str]
    refused: str = ""


def communicates(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> bool:
    """Whether a step of `p` needs other ranks: for its direction, or to judge its gradient."""
    if not is_distributed(p) or not sharded_dims(p):
        return shared(opt, p, group)
    return exchanged(opt, p, group) or group["nonfinite"] != "propagate"


def exchanged(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> bool:
    """Whether `p` has owners."""
    if group["rule"] != "matrix" or (opt.elementwise and opt.on_shards(group)):
        return False
    return p.numel() > 0 and owned(opt, p, group)


def scope(opt: MatrixOptimizer, p: Any) -> dist.ProcessGroup:
    """Who must agree on `p`: everyone, where its mesh has everyone; else its shards' holders. On
    what is whole here, those who share its work."""
    if not is_distributed(p) or not sharded_dims(p):
        return opt.company.group
    if p.device_mesh.size() == dist.get_world_size():
        return dist.distributed_c10d._get_default_group()
    return p.device_mesh.get_group(sharded_dims(p)[0])


@contextlib.contextmanager
def reporting(group: dist.ProcessGroup, what: str = "") -> Iterator[None]:
    """What a backend raises when a peer is gone, as one sentence that names it, and `what` for."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        gone = without_answer(ranks)
        who = f"ranks {gone} have ended or do not answer" if gone else "all answer, one has failed"
        raise RuntimeError(
            f"rank {dist.get_rank()} could not exchange {what}with ranks {ranks}: {who} ({error})"
        ) from error


def without_answer(ranks: list[int]) -> list[int]:
    """Those that do not say in the store, as every rank does whose exchange fails, that they live.

    Empty where the store itself is gone.
    """
    store = dist.distributed_c10d._get_default_store()
    until, gone = time.monotonic() + ANSWER, list[int]()
    try:
        store.set(f"orthonorm/alive/{dist.get_rank()}", "")
        while time.monotonic() < until:
            gone = [r for r in ranks if not store.check([f"orthonorm/alive/{r}"])]
            if not gone:
                break
            time.sleep(0.05)
    except RuntimeError:
        return []
    return gone


@contextlib.contextmanager
def all_succeed(name: str, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """What one rank raises, all raise, before anything is written: a gather of 8 bytes."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    numbers = gathered(ranks.group, device, int(failed is not None))
    if not any(numbers):
        return
    texts = gathered_objects(ranks.group, device, f"{failed}")
    place = numbers.index(1)
    raise ValueError(
        f"{name}: rank {dist.get_process_group_ranks(ranks.group)[place]} could not compute its "
        f"matrices (this is rank {dist.get_rank()}): {texts[place]}"
    ) from failed


def gathered(
    group: dist.ProcessGroup, device: torch.device, number: int, what: str = ""
) -> list[int]:
    """A number of every rank, from host to host where that is possible."""
    with reporting(group, what):
        hosts = hosts_of(group, device)
        mine = torch.tensor([number], device=hosts.device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=hosts.group)
    return [int(x) for x in everyone]


def gathered_objects(group: dist.ProcessGroup, device: torch.device, mine: T) -> list[T]:
    """An object of every rank, as `gathered`."""
    everyone = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=hosts_of(group, device).group)
    return everyone


@contextlib.contextmanager
def experts_succeed(
    opt: MatrixOptimizer, cut: list[Tensor], group: dict[str, Any]
) -> Iterator[None]:
    """What a rank raises over its own experts, all raise that exchange other matrices with it."""
    if not cut or not has_experts(opt, group):
        yield
        return
    with all_succeed(opt.name, ranks_of(cut[0]), cut[0].device):
        yield


def has_experts(opt: MatrixOptimizer, group: dict[str, Any]) -> bool:
    """Whether ranks prepare matrices of their own, and so may fail alone."""
    if group["rule"] != "matrix" or not opt.prepares:
        return False
    params = [p for p in group["params"] if is_distributed(p)]
    return any(sharded_dims(p) and not meets_owner(p, group) for p in params)


def check(opt: MatrixOptimizer, work: Work) -> None:
    """Raise on every rank unless all are to update the same parameters in the same order.

    One gather of eight bytes a rank and step; what differs is gathered where something does.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return  # to look at every parameter takes as long as other checks
    meet(opt)
    listed = listed_company(opt)
    for group, indices in work:
        present = set(indices)
        for i, p in enumerate(group["params"]):
            if communicates(opt, p, group):
                some = listed.setdefault(scope(opt, p), Listed(p.device, []))
                if i in present:
                    some.entries.append(describe(opt, p, group, i))
    compare(opt.name, listed)


def refuse(opt: MatrixOptimizer, error: Exception) -> None:
    """In place of `check`, on a rank whose settings, gradients or state are not as they must be."""
    meet(opt)  # for which the others wait
    found = [p for g in opt.param_groups for p in g["params"] if communicates(opt, p, g)]
    listed = {scope(opt, p): Listed(p.device, []) for p in found} | listed_company(opt)
    refused = {who: some._replace(refused=str(error)) for who, some in listed.items()}
    compare(opt.name, refused)


def listed_company(opt: MatrixOptimizer) -> dict[dist.ProcessGroup, Listed]:
    """Those who share work agree at every step, even if one of them finds nothing to share."""
    if opt.company is None:
        return {}
    device = next(p.device for g in opt.param_groups for p in g["params"])
    return {opt.company.group: Listed(device, [])}


def compare(name: str, listed: dict[dist.ProcessGroup, Listed]) -> None:
    """Tell all scopes, then raise for the first in which ranks differ."""
    found = [difference(who, listed[who]) for who in in_order([*listed])]
    if message := next(filter(None, found), ""):
        raise ValueError(f"{name}: {message} (this is rank {dist.get_rank()})")


def difference(who: dist.ProcessGroup, mine: Listed) -> str:
    """How the lists of ranks differ, the same sentence on all of them; or ""."""
    text = "\n".join([mine.refused, *mine.entries])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    what = f"parameter {mine.entries[0]} " if mine.entries else ""
    if all(other == digest for other in gathered(who, mine.device, digest, what)):
        return ""  # and so on every rank
    ranks = dist.get_process_group_ranks(who)
    told = gathered_objects(who, mine.device, (mine.refused, mine.entries))
    for rank, (refused, _) in zip(ranks, told, strict=True):
        if refused:
            return f"rank {rank} cannot make this step: {refused}"
    lists = [entries for _, entries in told]
    rank, place = next(
        (r, i) for r, other in enumerate(lists) for i in range(max(len(other), len(lists[0])))
        if other[i : i + 1] != lists[0][i : i + 1]
    )  # fmt: skip
    first, other = ((lists[r][place : place + 1] or ["no further parameter"])[0] for r in (0, rank))
    return (
        "all ranks must update the same parameters in the same order, got at place "
        f"{place}: parameter {first} on rank {ranks[0]}, {other} on rank {ranks[rank]}"
    )


def everywhere(
    opt: MatrixOptimizer, group: dict[str, Any], params: list[Tensor], flags: Tensor
) -> Tensor:
    """`flags` of the parameters, and of their other shards and shared copies."""
    held: dict[dist.ProcessGroup, list[int]] = {}
    for i, p in enumerate(params):
        for who in holders(opt, p, group):
            held.setdefault(who, []).append(i)
    for who, rows in held.items():
        places = torch.tensor(rows).to(flags.device, non_blocking=True)
        some = flags[places].to(torch.int32)
        with reporting(who):
            dist.all_reduce(some, dist.ReduceOp.MIN, group=who)
        flags = flags.index_put((places,), some.bool())
    return flags


def holders(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> list[dist.ProcessGroup]:
    """The groups of ranks that must find the same of a gradient, as they update `p` together."""
    if is_distributed(p) and sharded_dims(p):
        return [p.device_mesh.get_group(dim) for dim in sharded_dims(p)]
    return [opt.company.group] if shared(opt, p, group) else []
