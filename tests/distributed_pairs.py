"""The same optimizer on parameters with chosen placements and on plain ones, for
distributed_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_registry import device_mesh, local, part, put
from orthonorm import optim
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SHAPES = ((37, 24), (24, 37), (3, 64), (1, 16), (64, 64), (4, 8, 12), (3, 12, 8), (8, 3, 3, 2))
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "Muon": (optim.Muon, dict(lr=0.02)),
    "Muon, cautious": (optim.Muon, dict(lr=0.02, decay="cautious", nesterov=False)),
    "NorMuon": (optim.NorMuon, dict(weight_decay=0.1)),
    "NorMuon, long": (optim.NorMuon, dict(axis="long", rescale="rms", heavy_ball=True)),
    "AdaMuon": (optim.AdaMuon, dict()),
    "Scion": (optim.Scion, dict(momentum=0.1)),
    "ScionLight": (optim.ScionLight, dict(momentum=0.1)),
    "Signum": (optim.Signum, dict()),
    "AdaMuon, factored": (optim.AdaMuon, dict(moment="factored")),
    "AuON": (optim.AuON, dict()),
    "HybridAuON": (optim.HybridAuON, dict()),
    "MuonEq": (optim.MuonEq, dict()),
    "PolarGrad": (optim.PolarGrad, dict(polar_first=True)),
    "SCALE": (optim.SCALE, dict()),
    "SWAN": (optim.SWAN, dict()),
    "SteepestDescent": (optim.SteepestDescent, dict()),
    "TrustRegion": (optim.TrustRegion, dict(maximize=True)),
    # their whole update is at the owners
    "Conda": (optim.Conda, dict(update_proj_gap=2, weight_decay=0.1)),
    "SOAP": (optim.SOAP, dict(precondition_frequency=1)),
    "Shampoo": (optim.Shampoo, dict(maximize=True)),
    "SPlus": (optim.SPlus, dict()),
    "Dion": (optim.Dion, dict()),
    "AdaGO": (optim.AdaGO, dict()),
    "Dion2": (optim.Dion2, dict()),
    "NorDion2": (optim.Dion2, dict(beta2=0.9)),
    "SSO": (optim.SSO, dict(bisections=3)),
    "StiefelAdam": (optim.StiefelAdam, dict()),
    "Muon, clipped": (optim.Muon, dict(decay="clipped", bound=0.5)),
    "Muon, capped": (optim.Muon, dict(constraint="cap", bound=0.5)),
    "Muon, normalized": (optim.Muon, dict(constraint="normalize", bound=0.5)),
}


EVERYWHERE = ("Muon", "Conda")  # the others in the placements that differ most
ON_TWO = ("Muon, clipped", "Shampoo", "SPlus", "AdaGO", "Dion")  # as Conda: all of it at owners


def placements(world: int) -> dict[str, tuple[tuple[int, ...], list[Any]]]:
    found: dict[str, tuple[tuple[int, ...], list[Any]]] = {
        "rows": ((world,), [Shard(0)]),
        "columns": ((world,), [Shard(1)]),
        "last": ((world,), [Shard(-1)]),
        "replicated": ((world,), [Replicate()]),
    }
    if world == 4:
        found["hybrid"] = ((2, 2), [Replicate(), Shard(0)])
        found["inner replicas"] = ((2, 2), [Shard(1), Replicate()])
        found["both"] = ((2, 2), [Shard(0), Shard(1)])
        found["twice"] = ((2, 2), [Shard(0), Shard(0)])
    return found


def same(a: Any, b: Any) -> None:
    """This rank's parts of parameters and state are those of the whole ones of `b`, bit for bit."""
    for first, second in zip(a.param_groups, b.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(first["params"], second["params"], strict=True)):
            assert torch.equal(local(p.detach()), part(q.detach(), p)), (i, tuple(q.shape))
            assert a.state[p].keys() == b.state[q].keys()
            for key, value in b.state[q].items():
                other = a.state[p][key]
                if isinstance(value, Tensor):
                    assert torch.equal(local(other), part(value, other)), (i, tuple(q.shape), key)
                else:
                    assert other == value


def parameters(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def pair(
    name: str,
    mesh: Any,
    places: list[Any],
    dtype: Any = torch.float32,
    like: Any = None,
    **more: Any,
) -> tuple[Any, Any]:
    """The same optimizer on distributed and on plain parameters, one of them of two matrices, one
    of eight heads.

    `like`: the dtype whose values they have; `more`: further settings.
    """
    cls, kwargs = OPTIMIZERS[name]
    kwargs = {**kwargs, **more}
    torch.manual_seed(0)
    shapes = (*SHAPES, (30, 8), (40, 6), (6, 20), (14, 9))
    plain = [nn.Parameter(torch.randn(s).to(like or dtype).to(dtype)) for s in shapes]

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        *some, fused, heads, stored, parts = params
        return [
            {"params": some}, {"params": [fused], "split": (16, 14), "heads": (2, 1)},
            {"params": [heads], "heads": 8}, {"params": [stored], "transpose": True},
            {"params": [parts], "transpose": True, "split": (5, 4)},
        ]  # fmt: skip

    ours = [nn.Parameter(put(p.detach().clone(), mesh, places)) for p in plain]
    return cls(groups(ours), **kwargs), cls(groups(plain), **kwargs)


def set_gradients(step: int, a: Any, b: Any) -> None:
    torch.manual_seed(100 + step)
    for first, second in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(first["params"], second["params"], strict=True):
            q.grad = torch.randn(q.shape).to(q.dtype)
            p.grad = put(q.grad, p.device_mesh, p.placements)


def counted(f: Callable[[], None]) -> tuple[int, int, int, int]:
    """Bytes to and from other ranks in all-to-alls and gathers of tensors, collectives, and bytes
    of float sums."""
    seen = [0, 0, 0, 0]
    names = ("all_to_all_single", GATHER, "all_gather", "all_reduce")
    kept = {name: getattr(dist, name) for name in names}

    def all_to_all_single(
        out: Tensor, inp: Tensor, received: Any, sent: Any, group: Any, async_op: bool
    ) -> Any:
        assert (out.numel(), inp.numel()) == (sum(received), sum(sent))
        mine = dist.get_rank(group)
        seen[0] += (sum(sent) - sent[mine]) * inp.element_size()
        seen[1] += (sum(received) - received[mine]) * out.element_size()
        seen[2] += 1
        return kept["all_to_all_single"](out, inp, received, sent, group=group, async_op=async_op)

    def all_gather_single(out: Tensor, inp: Tensor, group: Any, async_op: bool) -> Any:
        others = dist.get_world_size(group) - 1
        assert out.nbytes == (others + 1) * inp.nbytes
        seen[0] += others * inp.nbytes
        seen[1] += others * inp.nbytes
        seen[2] += 1
        return kept[GATHER](out, inp, group=group, async_op=async_op)

    def other(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[2] += 1
            if name == "all_reduce" and args[0].is_floating_point():
                seen[3] += args[0].nbytes
            return kept[name](*args, **kwargs)

        return call

    try:
        dist.all_to_all_single = all_to_all_single
        setattr(dist, GATHER, all_gather_single)
        dist.all_gather, dist.all_reduce = other("all_gather"), other("all_reduce")
        f()
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return seen[0], seen[1], seen[2], seen[3]


def follow(name: str, world: int) -> None:
    found = placements(world)
    if name not in EVERYWHERE:
        kept = ("rows", "columns") if world == 2 else ("both",)
        found = {k: found[k] for k in kept}
    for label, (shape, places) in found.items():
        mesh = device_mesh("cpu", shape)
        a, b = pair(name, mesh, places)
        for step in range(2):
            set_gradients(step, a, b)
            a.step()
            b.step()
        try:
            same(a, b)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error
