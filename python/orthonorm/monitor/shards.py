"""Models whose parameters are DTensors: matrices are gathered where they are measured.

Not for metrics that |W|_F and sigma_1 give: power iteration has local products, W v of the rows
that are here, and small sums, W^T u.
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

FROM_PARTS = ("sigma_1", "frobenius", "stable_rank", "rms_to_rms")  # names of METRICS


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


class PartNorms(NamedTuple):
    """Of whole matrices: a lower bound of sigma_1, |W|_F, and v (this rank's part of it, if its
    columns are cut), from which to go on."""

    top: Tensor
    size: Tensor
    v: list[Tensor]


def spread_of(t: Any) -> Spread | None:
    """The ranks that have parts of a matrix; None where this one has all of it, or a batch."""
    if not is_distributed(t) or t.dim() != 2 or any(x.is_partial() for x in t.placements):
        return None
    dims = sharded_dims(t)
    return Spread(t.device_mesh.get_group(dims[0])) if len(dims) == 1 else None


def cut_among(tensors: Mapping[str, Tensor]) -> dict[tuple[Spread, torch.dtype], list[str]]:
    """Names of the matrices of which ranks have parts, by these ranks and the dtype of products."""
    found: dict[tuple[Spread, torch.dtype], list[str]] = {}
    for name, t in tensors.items():
        if spread := spread_of(t):
            found.setdefault((spread, accumulator(t)), []).append(name)
    return found


def part_norms(
    tensors: Sequence[Any], spread: Spread, steps: int, start: Sequence[Tensor | None]
) -> PartNorms:
    """`steps` >= 1 power steps, u <- W v / |W v|, v <- W^T u / |W^T u|, on parts of matrices.

    start: of v; None is a fixed vector. Every step sums one vector a matrix, all in one
    all-reduce: W^T u of cut rows, W v of cut columns. Sums and lengths are of float64, so that
    only the products round: sigma_1 of float32 was three times as far off as one process's
    without (1.3e-7, 2026-11).
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
    found = [(y / o if c else unit(x)).to(y.dtype)
             for x, y, o, c in zip(whole, mine, over, across, strict=True)]  # fmt: skip
    good = top.isfinite() & (top > 0)
    kept = [torch.where(g, new, old) for g, new, old in zip(good, found, v, strict=True)]
    dtype = parts[0].dtype
    return PartNorms((top * sizes).to(dtype), sizes.to(dtype), kept)


def started(t: Any, v: Tensor | None) -> Tensor:
    """v, or this rank's part of the fixed vector that one process starts from."""
    if v is not None:
        return v
    x = start_vector(torch.empty(1, t.shape[1], dtype=t.dtype, device=t.device))
    (dim,) = sharded_dims(t)
    if t.placements[dim].dim % 2 == 0:
        return x
    ranks = ranks_of(t)
    return x.narrow(0, *ranks.boxes(t.shape, t.placements)[ranks.rank][1])


def unit(x: Tensor) -> Tensor:
    """x / |x|; zero stays zero."""
    length = torch.linalg.vector_norm(x)
    return x / torch.where(length == 0, 1.0, length)
