"""Agreement of ranks before they exchange updates: all exchange the same, or all raise."""

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
ANSWER = 5.0  # seconds that ranks have to write their alive keys after an exchange failed
Work = list[tuple[dict[str, Any], list[int]]]  # groups, with the indices that have gradients


class Listed(NamedTuple):
    """Parameters that a rank is to update together with others; `refused` says why it cannot."""

    device: torch.device
    entries: list[str]
    refused: str = ""


def communicates(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> bool:
    """True if a step of `p` needs other ranks, for its direction or to judge its gradient."""
    if not is_distributed(p) or not sharded_dims(p):
        return shared(opt, p, group)
    return exchanged(opt, p, group) or group["nonfinite"] != "propagate"


def exchanged(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> bool:
    """True if a bucket steps `p`: by owners, by sums of Gram matrices, or as shared work."""
    if group["rule"] != "matrix" or (opt.elementwise and opt.on_shards(group)):
        return False
    return p.numel() > 0 and owned(opt, p, group)


def scope(opt: MatrixOptimizer, p: Any) -> dist.ProcessGroup:
    """Return the group of ranks that must agree on `p`.

    These are all ranks if its mesh has all of them, else the ranks that hold its shards. For a
    parameter that is whole here, these are the ranks that share its work.
    """
    if not is_distributed(p) or not sharded_dims(p):
        return opt.company.group
    if p.device_mesh.size() == dist.get_world_size():
        return dist.distributed_c10d._get_default_group()
    return p.device_mesh.get_group(sharded_dims(p)[0])


@contextlib.contextmanager
def reporting(group: dist.ProcessGroup, what: str = "") -> Iterator[None]:
    """Turn a backend's error into one that names lost ranks, and `what` was to be exchanged."""
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
    """Return the ranks that have not written their alive key to the store.

    Every rank whose exchange fails writes its key. Wait up to ANSWER seconds for the others. If the
    store itself is gone, return [].
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
    """Raise ValueError on all ranks if the body raises on one, by a gather of 8 bytes."""
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
    """Return every rank's number, exchanged between hosts where that is possible."""
    with reporting(group, what):
        hosts = hosts_of(group, device)
        mine = torch.tensor([number], device=hosts.device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=hosts.group)
    return [int(x) for x in everyone]


def gathered_objects(group: dist.ProcessGroup, device: torch.device, mine: T) -> list[T]:
    """Return every rank's object, exchanged as in `gathered`."""
    everyone = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=hosts_of(group, device).group)
    return everyone


@contextlib.contextmanager
def experts_succeed(
    opt: MatrixOptimizer, cut: list[Tensor], group: dict[str, Any]
) -> Iterator[None]:
    """Raise on all ranks if one fails to prepare its own experts, before other matrices travel.

    `cut` are the matrices that travel. The ranks that exchange them are the ones that raise.
    """
    if not cut or not has_experts(opt, group):
        yield
        return
    with all_succeed(opt.name, ranks_of(cut[0]), cut[0].device):
        yield


def has_experts(opt: MatrixOptimizer, group: dict[str, Any]) -> bool:
    """True if ranks prepare matrices that only they hold, so that one may fail alone."""
    if group["rule"] != "matrix" or not opt.prepares:
        return False
    params = [p for p in group["params"] if is_distributed(p)]
    return any(sharded_dims(p) and not meets_owner(p, group) for p in params)


def check(opt: MatrixOptimizer, work: Work) -> None:
    """Raise on every rank unless all are to update the same parameters in the same order.

    A step gathers 8 bytes per rank in every group of `scope`. Whole lists are gathered only if
    these bytes differ.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return  # the loop below would take as long as all other checks
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
    """Tell the other ranks why this one cannot step; called instead of `check` after an error."""
    meet(opt)  # the other ranks wait for it
    found = [p for g in opt.param_groups for p in g["params"] if communicates(opt, p, g)]
    listed = {scope(opt, p): Listed(p.device, []) for p in found} | listed_company(opt)
    refused = {who: some._replace(refused=str(error)) for who, some in listed.items()}
    compare(opt.name, refused)


def listed_company(opt: MatrixOptimizer) -> dict[dist.ProcessGroup, Listed]:
    """Return an empty list for the group of `share_work`, or {} without one.

    Its ranks compare at every step, even if one of them finds nothing to share.
    """
    if opt.company is None:
        return {}
    device = next(p.device for g in opt.param_groups for p in g["params"])
    return {opt.company.group: Listed(device, [])}


def compare(name: str, listed: dict[dist.ProcessGroup, Listed]) -> None:
    """Compare with the ranks of every group, then raise for the first group that differs."""
    found = [difference(who, listed[who]) for who in in_order([*listed])]
    if message := next(filter(None, found), ""):
        raise ValueError(f"{name}: {message} (this is rank {dist.get_rank()})")


def difference(who: dist.ProcessGroup, mine: Listed) -> str:
    """Return the sentence, equal on all ranks, that tells how their lists differ; or ""."""
    text = "\n".join([mine.refused, *mine.entries])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    what = f"parameter {mine.entries[0]} " if mine.entries else ""
    if all(other == digest for other in gathered(who, mine.device, digest, what)):
        return ""  # every rank sees the same digests, so all return here
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
    """Return `flags`, each True only if it is on all ranks that update the parameter together."""
    held: dict[dist.ProcessGroup, list[int]] = {}
    for i, p in enumerate(params):
        for who in holders(opt, p, group):
            held.setdefault(who, []).append(i)
    for who, indices in held.items():
        places = torch.tensor(indices).to(flags.device, non_blocking=True)
        some = flags[places].to(torch.int32)
        with reporting(who):
            dist.all_reduce(some, dist.ReduceOp.MIN, group=who)
        flags = flags.index_put((places,), some.bool())
    return flags


def holders(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> list[dist.ProcessGroup]:
    """Return the groups of ranks that update `p` together, so must judge its gradient alike."""
    if is_distributed(p) and sharded_dims(p):
        return [p.device_mesh.get_group(dim) for dim in sharded_dims(p)]
    return [opt.company.group] if shared(opt, p, group) else []
