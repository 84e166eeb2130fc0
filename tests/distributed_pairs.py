"""The same optimizer on parameters with chosen placements and on plain ones, for
distributed_cases.py."""

from __future__ import annotations

from typing import Any

import torch
from orthonorm import optim
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import init_device_mesh as device_mesh

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
}


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
    return found


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def same(a: Any, b: Any) -> None:
    """Parameters and state of two optimizers are equal bit for bit."""
    for first, second in zip(a.param_groups, b.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(first["params"], second["params"], strict=True)):
            assert torch.equal(whole(p.detach()), q), (i, tuple(q.shape))
            assert a.state[p].keys() == b.state[q].keys()
            for key, value in b.state[q].items():
                other = a.state[p][key]
                if isinstance(value, Tensor):
                    assert torch.equal(whole(other), value), (i, tuple(q.shape), key)
                else:
                    assert other == value


def pair(name: str, mesh: Any, places: list[Any], shapes: Any = SHAPES) -> tuple[Any, Any]:
    """The same optimizer on distributed and on plain parameters, two matrices of them split."""
    cls, kwargs = OPTIMIZERS[name]
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(s)) for s in shapes]
    fused = nn.Parameter(torch.randn(30, 8))

    def put(p: Tensor) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(p.detach(), mesh, places))

    def groups(params: list[nn.Parameter], last: nn.Parameter) -> list[dict[str, Any]]:
        return [{"params": params}, {"params": [last], "split": (16, 14), "heads": (2, 1)}]

    ours = cls(groups([put(p) for p in plain], put(fused)), **kwargs)
    return ours, cls(groups(plain, fused), **kwargs)


def set_gradients(step: int, a: Any, b: Any) -> None:
    torch.manual_seed(100 + step)
    for first, second in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(first["params"], second["params"], strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)


def follow(name: str, world: int) -> None:
    for label, (shape, places) in placements(world).items():
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
