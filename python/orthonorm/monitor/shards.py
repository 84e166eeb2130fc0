"""Models whose parameters are DTensors: matrices are gathered where they are measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.tensors import is_distributed


def gathered(t: Any) -> Tensor:
    """All of a DTensor, which every rank must ask for; other tensors as they are."""
    return t.full_tensor() if is_distributed(t) else t


def on_any_rank(fact: bool, params: Iterable[Any]) -> bool:
    """Whether it holds on one rank of the meshes of the DTensors: clocks differ, decisions must
    not."""
    meshes: dict[Any, torch.device] = {}
    for p in params:
        if is_distributed(p):
            meshes.setdefault(p.device_mesh, p.device)
    for mesh, device in meshes.items():
        flag = torch.tensor(int(fact), device=device)
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MAX, mesh.get_group(dim))
        fact = bool(flag)
    return fact
