"""DTensors as an optimizer sees them: local blocks, whole shapes, state laid out as its parameter.

torch.distributed.tensor is imported where a DTensor has been met, so not by `import orthonorm`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .views import flattens

PLAIN = (Tensor, torch.nn.Parameter)  # the quick answer


def is_distributed(t: Tensor) -> bool:
    """Whether `t` is a DTensor; compiled steps hold none."""
    if type(t) in PLAIN or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Any:
    """This rank's block of a DTensor, sharing its memory; other tensors as they are."""
    return t.to_local() if is_distributed(t) else t


def whole(t: Tensor) -> Tensor:
    """Shape, strides and dtype of all of `t`, without memory."""
    if not is_distributed(t):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def sharded_dims(p: Any) -> list[int]:
    """The mesh dimensions, of more than one rank, along which a DTensor is sharded."""
    return [i for i, x in enumerate(p.placements) if x.is_shard() and p.device_mesh.size(i) > 1]


def state_zeros(p: Any, shape: Sequence[int], batch_dims: int) -> Tensor:
    """State of the parameter's matrices: sharded along the stack that p is sharded along, or dim 0.

    `batch_dims` counts the dimensions of `shape` that number matrices.
    """
    if not is_distributed(p):
        return p.new_zeros(shape)
    module = sys.modules["torch.distributed.tensor"]
    placements = [
        module.Shard(x.dim if x.dim < batch_dims else 0) if x.is_shard() else x
        for x in p.placements
    ]
    mesh = p.device_mesh
    return module.zeros(*shape, dtype=p.dtype, device_mesh=mesh, placements=placements)


class Ranks(NamedTuple):
    """The ranks of one mesh dimension that hold the shards of a parameter."""

    group: dist.ProcessGroup
    rank: int  # this one's place in the group
    shards: tuple[int, ...]  # which shard each rank of the group holds

    @property
    def size(self) -> int:
        return len(self.shards)

    def block(self, length: int, rank: int) -> tuple[int, int]:
        """(offset, length) of a rank's part of a dimension, as torch.chunk cuts it."""
        chunk = -(-length // self.size)
        start = min(self.shards[rank] * chunk, length)
        return start, min(chunk, length - start)


def ranks_of(p: Any) -> Ranks:
    (dim,) = sharded_dims(p)
    mesh = p.device_mesh
    group = mesh.get_group(dim)
    members = dist.get_process_group_ranks(group)
    places = tuple(int((mesh.mesh == g).nonzero()[0][dim]) for g in members)
    return Ranks(group, dist.get_rank(group), places)


def shard_dim(p: Any) -> int:
    (dim,) = sharded_dims(p)
    return p.placements[dim].dim % p.dim()


def meets_owner(p: Any, group: Mapping[str, Any]) -> bool:
    """Whether matrices of `p` are cut, so that no rank has them whole."""
    if not is_distributed(p):
        return False
    stacks = 0 if p.dim() < 3 or flattens(p.shape, group) else p.dim() - 2
    return any(p.placements[i].dim % p.dim() >= stacks for i in sharded_dims(p))


def check_placements(label: str, p: Any, cut: bool) -> None:
    """Raise ValueError for placements that cannot be updated: partial sums, several shardings."""
    got = f"got {tuple(p.placements)} on a mesh of shape {tuple(p.device_mesh.shape)}"
    if any(x.is_partial() for x in p.placements):
        raise ValueError(f"{label} must be replicated or sharded, {got}")
    dims = sharded_dims(p)
    if not cut:
        return
    if len(dims) > 1:
        raise ValueError(f"{label} must be sharded along one mesh dimension at most, {got}")
    if type(p.placements[dims[0]]).__name__ != "Shard":
        raise ValueError(f"{label} must be in plain Shard placements, {got}")
    ranks, dim = ranks_of(p), shard_dim(p)
    _, length = ranks.block(p.shape[dim], ranks.rank)
    if p.to_local().shape[dim] != length:
        raise ValueError(
            f"{label} must be cut as torch.chunk does, {length} of {p.shape[dim]} on rank "
            f"{ranks.rank}, got {p.to_local().shape[dim]}"
        )
