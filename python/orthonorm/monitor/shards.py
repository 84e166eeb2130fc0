"""Measurement of DTensors: whole matrices are gathered, or norms are computed from the parts.

Metrics that follow from |W|_F and sigma_1 need no gathering. If rows are cut, a power step
multiplies this rank's rows, W v, and sums the vectors W^T u over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.spread import Spread, finished
from ..ops.normalize import accumulator
from ..ops.spectral import start_vector
from ..optim.tensors import is_distributed, local, ranks_of, sharded_dims

FROM_PARTS = ("sigma_1", "frobenius", "stable_rank", "rms_to_rms")  # METRICS that need no gathering


def gathered(t: Any) -> Tensor:
    """Return a DTensor as one tensor (every rank must call), and other tensors as they are."""
    return t.full_tensor() if is_distributed(t) else t


def on_any_rank(fact: bool, params: Iterable[Any]) -> bool:
    """Return True if `fact` is true on any rank of the DTensors' meshes; all ranks must call.

    Ranks have to decide alike, also about facts on which they differ, such as time spent.
    """
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


class PartNorms(NamedTuple):
    """Norms of whole matrices: a lower bound of sigma_1, |W|_F, and v to continue from.

    v is this rank's part of the vector if columns are cut.
    """

    top: Tensor
    size: Tensor
    v: list[Tensor]


def spread_of(t: Any) -> Spread | None:
    """Return the ranks among which a matrix is cut by rows or columns.

    None for other tensors: whole ones, batches, partial sums, and cuts along two mesh dimensions.
    """
    if not is_distributed(t) or t.dim() != 2 or any(x.is_partial() for x in t.placements):
        return None
    dims = sharded_dims(t)
    return Spread(t.device_mesh.get_group(dims[0])) if len(dims) == 1 else None


def cut_among(tensors: Mapping[str, Tensor]) -> dict[tuple[Spread, torch.dtype], list[str]]:
    """Return the names of cut matrices, grouped by their ranks and by the dtype of products."""
    groups: dict[tuple[Spread, torch.dtype], list[str]] = {}
    for name, t in tensors.items():
        if spread := spread_of(t):
            groups.setdefault((spread, accumulator(t)), []).append(name)
    return groups


def part_norms(
    tensors: Sequence[Any], spread: Spread, steps: int, start: Sequence[Tensor | None]
) -> PartNorms:
    """Take `steps` >= 1 power steps, u <- W v / |W v|, v <- W^T u / |W^T u|, on parts of matrices.

    `start` has the first v of each matrix; None takes a fixed vector. Each step sums one vector per
    matrix, all in one all-reduce: W^T u if rows are cut, W v if columns are. Sums and lengths are
    float64, so that only the products round. Otherwise the float32 sigma_1 was three times as far
    off as in one process (1.3e-7; 2026-11).
    """
    across = [bool(t.placements[sharded_dims(t)[0]].dim % 2) for t in tensors]  # columns are cut
    parts = [local(t.detach()).to(accumulator(t)) for t in tensors]
    sizes = finished(spread.norms(parts))
    lines = [(x.mT if c else x) / torch.where(s == 0, 1.0, s).to(x.dtype)
             for x, s, c in zip(parts, sizes, across, strict=True)]  # fmt: skip
    v = [started(t, x) for t, x in zip(tensors, start, strict=True)]
    whole = v
    if any(across):  # u = W v
        mine = [(b.mT @ x if c else x.new_zeros(0)).double()
                for b, x, c in zip(lines, v, across, strict=True)]  # fmt: skip
        sums = finished(spread.sums(mine))
        whole = [u if c else x for u, x, c in zip(sums, v, across, strict=True)]
    for _ in range(steps):
        mine = [b @ unit(x).to(b.dtype) for b, x in zip(lines, whole, strict=True)]
        both = [
            torch.cat([(b.mT @ y).double(), y.double().square().sum(0, keepdim=True)])
            for b, y in zip(lines, mine, strict=True)
        ]
        sums = finished(spread.sums(both))
        over = [z[-1].sqrt() for z in sums]  # |W v|, or |W^T u| of cut columns
        whole = [z[:-1] for z in sums]
    lengths = [torch.linalg.vector_norm(x) for x in whole]
    top = torch.stack([o if c else torch.where(o == 0, 0.0, n / o)
                       for n, o, c in zip(lengths, over, across, strict=True)])  # fmt: skip
    reached = [(y / o if c else unit(x)).to(y.dtype)
               for x, y, o, c in zip(whole, mine, over, across, strict=True)]  # fmt: skip
    good = top.isfinite() & (top > 0)
    next_v = [torch.where(g, new, old) for g, new, old in zip(good, reached, v, strict=True)]
    dtype = parts[0].dtype
    return PartNorms((top * sizes).to(dtype), sizes.to(dtype), next_v)


def started(t: Any, v: Tensor | None) -> Tensor:
    """Return v if given, else this rank's part of the fixed vector that one process starts from."""
    if v is not None:
        return v
    x = start_vector(torch.empty(1, t.shape[1], dtype=t.dtype, device=t.device))
    (dim,) = sharded_dims(t)
    if t.placements[dim].dim % 2 == 0:
        return x
    ranks = ranks_of(t)
    return x.narrow(0, *ranks.boxes(t.shape, t.placements)[ranks.rank][1])


def unit(x: Tensor) -> Tensor:
    """Return x / |x|; zero stays zero."""
    length = torch.linalg.vector_norm(x)
    return x / torch.where(length == 0, 1.0, length)
