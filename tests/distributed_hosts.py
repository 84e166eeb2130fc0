"""Cases of tests/test_distributed.py: groups without a backend for CPU tensors, as nccl's are.

"cuda:gloo" is such a group without a GPU: it takes no CPU tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from distributed_pairs import parameters
from distributed_refusals import give_gradients, named, unchanged
from distributed_registry import Context, case, device_mesh, raises
from orthonorm import optim
from orthonorm.distributed import agreement, hosts
from orthonorm.optim.tensors import ranks_of
from torch.distributed.tensor import Shard

CUDA = torch.device("cuda", 0)


def deaf(*ranks: int) -> Any:
    """Called by all ranks of the world."""
    group = dist.new_group([*ranks], backend="cuda:gloo")
    if dist.get_rank() not in ranks:
        return None
    raises(lambda: dist.all_reduce(torch.ones(1), group=group), "cpu")
    return group


@contextlib.contextmanager
def gathers() -> Iterator[list[tuple[str, Any]]]:
    """The device and the group of what is gathered."""
    seen: list[tuple[str, Any]] = []
    kept = dist.all_gather

    def all_gather(out: Any, mine: Any, group: Any) -> Any:
        seen.append((mine.device.type, group))
        return kept(out, mine, group=group)

    dist.all_gather = all_gather
    try:
        yield seen
    finally:
        dist.all_gather = kept


@contextlib.contextmanager
def scopes(scope: Callable[..., Any]) -> Iterator[None]:
    kept, agreement.scope = agreement.scope, scope
    try:
        yield
    finally:
        agreement.scope = kept


@case(2, 4)
def ranks_without_a_cpu_backend_agree_between_hosts(context: Context) -> None:
    group, odd = deaf(*range(context.world)), context.rank == 1
    opt = optim.Muon(named(device_mesh("cpu", (context.world,)), [Shard(0)], "abc"))
    before = give_gradients(opt)
    (work,) = [(g, [0, 1, 2]) for g in opt.param_groups]
    with scopes(lambda *_: group), gathers() as seen:
        agreement.check(opt, [work])
        agreement.check(opt, [work])
        gloo = hosts.hosts_of(group, CUDA).group
        assert seen == [("cpu", gloo)] * 2 and gloo is not group
        assert (gloo.rank(), gloo.size()) == (context.rank, context.world)
        some = (work[0], [0, 2] if odd else [0, 1, 2])
        raises(lambda: agreement.check(opt, [some]), "'b'", "'c'", "on rank 1",
               f"this is rank {context.rank}")  # fmt: skip
        if odd:
            opt.param_groups[0]["lr"] = -1.0
        raises(opt.step, "rank 1 cannot make this step", "-1.0")
    unchanged(opt, before)


@case(2)
def a_failure_is_told_between_hosts(context: Context) -> None:
    opt = optim.Muon(named(device_mesh("cpu", (2,)), [Shard(0)], "a"))
    ranks = ranks_of(parameters(opt)[0])._replace(group=deaf(0, 1))

    def one_fails() -> None:
        with agreement.all_succeed("Conda", ranks, CUDA):
            if context.rank == 1:
                raise ArithmeticError("no basis")

    with gathers() as seen:
        raises(one_fails, "Conda: rank 1 could not", "no basis", f"this is rank {context.rank}")
    assert seen[0] == ("cpu", hosts.hosts_of(ranks.group, CUDA).group)


@case(4)
def hosts_of_several_groups_do_not_wait_in_a_circle(context: Context) -> None:
    """Every rank is in two groups, and lists first the one that its neighbour lists last."""
    rank, world = context.rank, context.world
    rings = [deaf(*sorted((r, (r + 1) % world))) for r in range(world)]
    mine = [rings[rank], rings[rank - 1]]
    same = agreement.Listed(CUDA, ["p"])
    agreement.compare("Muon", dict.fromkeys(mine, same))
    other = agreement.Listed(CUDA, ["q" if rank == 1 else "p"])
    if rank in (0, 1, 2):
        raises(lambda: agreement.compare("Muon", dict.fromkeys(mine, other)), "q on rank 1")
    else:
        agreement.compare("Muon", dict.fromkeys(mine, other))
