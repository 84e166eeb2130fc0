"""DTensors in an optimizer: local blocks, whole shapes, and state placed like its parameter.

torch.distributed.tensor is never imported here, but looked up: it is loaded if there are DTensors.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import PLAIN
from .views import cuts_stacks, flattens, heads_of


def is_distributed(t: Any) -> bool:
    """True if `t` is a DTensor; False within compiled steps, which hold none."""
    if type(t) in PLAIN or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Any:
    """Return this rank's block of a DTensor, sharing its memory; other tensors as they are."""
    return t.to_local() if is_distributed(t) else t


def bits_as(t: Any, dtype: torch.dtype) -> Any:
    """View the memory of `t` as another dtype of the same size."""
    if not is_distributed(t):
        return t.view(dtype)
    kept = dict(run_check=False, shape=t.shape, stride=t.stride())
    return type(t).from_local(t.to_local().view(dtype), t.device_mesh, t.placements, **kept)


def whole(t: Tensor) -> Tensor:
    """Return `t`, or for a DTensor a meta tensor with the shape, strides and dtype of all of it."""
    if not is_distributed(t):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def numbers(values: Sequence[float] | float, device: torch.device) -> Tensor:
    """Return numbers of the host as a float64 tensor on a device."""
    made = torch.tensor(values, dtype=torch.float64)
    return written(made, device) if captured(device) else sent(made, device)


class Numbers:
    """Numbers of the host on devices, kept for later steps; nobody may write the tensors."""

    KEPT = 64  # of schedules' numbers each is used once

    def __init__(self) -> None:
        self._ones: dict[torch.device, Tensor] = {}
        self._kept: dict[tuple[float, torch.device, int], Tensor] = {}  # by number, device, stream

    def __call__(self, value: float, device: torch.device) -> Tensor:
        """Return a number as a 0-d float64 tensor on a device.

        A CUDA graph gets its own: one that is kept here may be dropped before it is replayed. None
        of the graph's is kept, which would hold nothing until the graph is replayed.
        """
        if torch.compiler.is_compiling():
            return self._product(value, device)
        if captured(device):
            return torch.full((), value, dtype=torch.float64, device=device)
        key = (value, device, stream_of(device))
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) == self.KEPT:
                self._kept.clear()
            found = self._kept[key] = self._product(value, device)
        return found

    def _product(self, value: float, device: torch.device) -> Tensor:
        """Return the number by a product with 1, not by a fill.

        torch.compile makes tensor arithmetic of it, so one graph serves every value; `fill_` and
        `full` compile a graph for each (torch 2.13).
        """
        if device not in self._ones:
            self._ones[device] = torch.ones((), dtype=torch.float64, device=device)
        return self._ones[device] * value


def stream_of(device: torch.device) -> int:
    """Return the current stream of a GPU that is in use, else 0."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.current_stream(device).cuda_stream


def captured(device: torch.device) -> bool:
    """True if a CUDA graph is being made of what the device is told."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def written(made: Tensor, device: torch.device) -> Tensor:
    """Return a copy whose numbers are arguments of kernels.

    A CUDA graph keeps these. A copy in it reads `made` anew in every replay, when that is gone.
    """
    found = torch.zeros(made.shape, dtype=made.dtype, device=device)
    torch._foreach_add_(found.view(-1).unbind(), made.view(-1).tolist())
    return found


def sent(t: Tensor, device: torch.device) -> Tensor:
    """Return `t` on a device, by a copy that does not wait for the device's earlier work.

    CUDA reads memory that is not pinned before the call returns, so `t` may change afterwards.
    Pinned memory is read when the copy runs; torch's own optimizers copy rates the same way. A copy
    to the host does wait, or the host could read it before it has arrived.
    """
    return t.to(device, non_blocking=device.type != "cpu")


@functools.lru_cache(maxsize=64)
def mesh_ranks(mesh: Any) -> Any:
    """Return a mesh's ranks as nested lists, from a cache.

    torch 2.13 computes them at every request: 12 ms a step for 148 parameters (2026-11).
    """
    return mesh.mesh.tolist()


@functools.lru_cache(maxsize=64)
def mesh_places(mesh: Any) -> dict[int, tuple[int, ...]]:
    """Return {rank: coordinates} of a mesh, from a cache as in `mesh_ranks`."""
    coordinates = itertools.product(*map(range, mesh.shape))
    return dict(zip(mesh.mesh.flatten().tolist(), coordinates, strict=True))


def is_cut(placement: Any) -> bool:
    """True for Shard, and for FSDP2's strided shard of a weight cut by tensor parallelism."""
    return hasattr(placement, "dim")  # is_shard() is False for strided shards (torch 2.13)


def sharded_dims(p: Any) -> list[int]:
    """Return the mesh dimensions, of more than one rank, along which a DTensor is sharded."""
    return [i for i, x in enumerate(p.placements) if is_cut(x) and p.device_mesh.size(i) > 1]


def state_zeros(p: Any, shape: Sequence[int], batch_dims: int) -> Tensor:
    """Return zeros for state of a parameter's matrices; the first `batch_dims` dims number them."""
    if not is_distributed(p):
        return p.new_zeros(shape)
    zeros = sys.modules["torch.distributed.tensor"].zeros
    places = state_placements(p, batch_dims)
    return zeros(*shape, dtype=p.dtype, device_mesh=p.device_mesh, placements=places)


def state_placements(p: Any, batch_dims: int) -> list[Any]:
    """Return placements of state: sharded along the batch dimension that p is, else along dim 0.

    Strided shards stay strided, so that the order of blocks is that of p.
    """
    shard = sys.modules["torch.distributed.tensor"].Shard
    places = []
    for x in p.placements:
        dim = x.dim % p.dim() if is_cut(x) else 0
        kept = not is_cut(x) or (strided(x) and dim < batch_dims)
        places.append(x if kept else shard(dim if dim < batch_dims else 0))
    return places


Box = tuple[tuple[int, int], ...]  # (offset, length) in every dimension


class Ranks(NamedTuple):
    """Ranks that share a parameter: all of a mesh of the whole world, or one mesh dimension.

    `places` are their coordinates in the mesh, in the order of the group.
    """

    group: dist.ProcessGroup
    rank: int  # index of this rank in the group
    mesh: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.places)

    def boxes(self, shape: Sequence[int], placements: Sequence[Any]) -> tuple[Box, ...]:
        """Return the box of a tensor that each rank holds, cut as torch.chunk does."""
        cuts = [(i, x.dim % len(shape)) for i, x in enumerate(placements) if is_cut(x)]
        # a strided shard is cut after the placements to its right
        late = [c for c in cuts if strided(placements[c[0]])]
        order = [c for c in cuts if c not in late] + late[::-1]
        return tuple(self.box(shape, order, place) for place in self.places)

    def box(
        self, shape: Sequence[int], cuts: Sequence[tuple[int, int]], place: tuple[int, ...]
    ) -> Box:
        found = [(0, n) for n in shape]
        for mesh_dim, dim in cuts:
            start, length = found[dim]
            chunk = -(-length // self.mesh[mesh_dim])
            begin = min(place[mesh_dim] * chunk, length)
            found[dim] = start + begin, min(chunk, length - begin)
        return tuple(found)

    def replicas(self, placements: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """Return a key per rank; the ranks with equal keys hold one whole tensor together."""
        whole = [i for i, x in enumerate(placements) if not is_cut(x)]
        return tuple(tuple(place[i] for i in whole) for place in self.places)


def strided(placement: Any) -> bool:
    return hasattr(placement, "split_factor")


def ranks_of(p: Any) -> Ranks:
    mesh = p.device_mesh
    if mesh.size() == dist.get_world_size():
        group = dist.distributed_c10d._get_default_group()
    else:
        (dim,) = sharded_dims(p)
        group = mesh.get_group(dim)
    places = tuple(mesh_places(mesh)[r] for r in dist.get_process_group_ranks(group))
    return Ranks(group, dist.get_rank(group), tuple(mesh.shape), places)


def meets_owner(p: Any, group: Mapping[str, Any]) -> bool:
    """True if matrices of `p` are cut across ranks, so that no rank has them whole."""
    if not is_distributed(p) or has_whole_heads(p, group):
        return False
    stacks = 0 if p.dim() < 3 or flattens(p.shape, group) else p.dim() - 2
    return any(p.placements[i].dim % p.dim() >= stacks for i in sharded_dims(p))


def has_whole_heads(p: Any, group: Mapping[str, Any]) -> bool:
    """True if `p` is cut between heads: along rows, by a number of ranks that divides `heads`."""
    if group.get("heads") is None or group.get("split") is not None or group.get("transpose"):
        return False
    if cuts_stacks(p.shape, group):
        return False
    dims = sharded_dims(p)
    (heads,) = heads_of(group, [p])
    by_rows = all(p.placements[i].dim % p.dim() == 0 for i in dims)
    return by_rows and heads % math.prod(p.device_mesh.size(i) for i in dims) == 0


def views_here(p: Any, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the view keys for this rank's block of `p`, with the number of heads in the block.

    The matrices of `p` must be whole on each rank.
    """
    if not is_distributed(p) or not has_whole_heads(p, group):
        return group
    (heads,) = heads_of(group, [p])
    return {**group, "heads": heads * p.to_local().shape[0] // p.shape[0]}


def check_placements(label: str, p: Any, cut: bool) -> None:
    """Raise ValueError for placements that cannot be updated: partial sums, unsupported cuts."""
    mesh, places = p.device_mesh, p.placements
    got = f"got {tuple(places)} on a mesh of shape {tuple(mesh.shape)}"
    if any(x.is_partial() for x in places):
        raise ValueError(f"{label} must be replicated or sharded, {got}")
    if not cut:
        return
    if len(sharded_dims(p)) > 1 and mesh.size() < dist.get_world_size():
        raise ValueError(
            f"{label} must be sharded along one mesh dimension, or on a mesh of all "
            f"{dist.get_world_size()} ranks, {got}"
        )
    for i, x in enumerate(places):
        inner = [mesh.size(j) for j in range(i + 1, mesh.ndim)
                 if is_cut(places[j]) and places[j].dim == x.dim] if strided(x) else []  # fmt: skip
        if strided(x) and x.split_factor != math.prod(inner):
            raise ValueError(f"{label} must be cut by all mesh dimensions it is strided by, {got}")
    ranks = ranks_of(p)
    held = tuple(length for _, length in ranks.boxes(p.shape, places)[ranks.rank])
    if tuple(p.to_local().shape) != held:
        raise ValueError(
            f"{label} must be cut as torch.chunk does, {held} on rank {ranks.rank}, "
            f"got {tuple(p.to_local().shape)}"
        )
