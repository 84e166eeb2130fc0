"""State kept smaller than it is computed with: bfloat16, or 8 bits by block-wise dynamic codes.

8 bits (arXiv:2110.02861): every BLOCK elements of a matrix, row by row, share a float32 scale, the
largest absolute value; an element is the nearest of 256 values of [-1, 1] times it (`values`, the
map of bitsandbytes' create_dynamic_map). The last block of a matrix may be shorter; none spans two
matrices, so that NaN stays in its own. Second moments, which are not negative, have the map of
[0, 1], where what is positive is never rounded to 0: a step divides by their roots.

A step reads state into float32 (one work buffer for as many matrices as fit one; where a rule has
`prepare`, all of it), computes as it would with float32 state, and rounds once when it writes back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import decayed_update_
from ..ops.steps import work_parts

if TYPE_CHECKING:
    from .state import Batch

BLOCK = 256  # elements; 4 bytes of scale are 1/64 byte for each
SCALES = "_scales"
UNSIGNED = ("exp_avg_sq", "second_moment")
STATE_DTYPES = (None, "bfloat16", "8bit")


@functools.cache
def values(signed: bool) -> list[float]:
    """The 256 values in order: of seven decades, each with twice the means of the one below; 0; 1.
    Unsigned: of each decade twice as many."""
    found = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        means = [0.1 + 0.9 * (k + 0.5) / count for k in range(count)]
        found += [10.0 ** (i - 6) * mean for mean in means]
        found += [-(10.0 ** (i - 6)) * mean for mean in means if signed]
    return sorted(found)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of matrices (..., m, n)."""
    return (*shape[:-2], -(-shape[-2] * shape[-1] // BLOCK))


def quantized(tensors: list[Tensor], signed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Codes (uint8) and scales (float32) of matrices."""
    rows = torch.cat([blocks(t) for t in tensors]).float()
    scales = rows.abs().amax(1, keepdim=True)
    rows = torch.where(scales == 0, 0.0, rows / scales)
    table = torch.tensor(values(signed), device=rows.device)
    codes = torch.bucketize(rows, (table[1:] + table[:-1]) / 2, out_int32=True)
    if not signed:
        codes = torch.where(rows > 0, codes.clamp(min=1), codes)
    return unblocked(codes.to(torch.uint8), tensors), [
        part.view(scales_shape(t.shape))
        for part, t in zip(scales.split([counts(t) for t in tensors]), tensors, strict=True)
    ]


def dequantized(codes: list[Tensor], scales: list[Tensor], signed: bool) -> list[Tensor]:
    """Matrices in float32, in one buffer."""
    rows = torch.cat([blocks(c) for c in codes])
    table = torch.tensor(values(signed), device=rows.device)
    rows = table[rows.int()] * torch.cat([s.flatten() for s in scales]).float().unsqueeze(1)
    return unblocked(rows, codes)


def blocks(t: Tensor) -> Tensor:
    """The elements of each matrix in rows of BLOCK, filled up with zeros."""
    size = t.shape[-2] * t.shape[-1]
    return F.pad(t.flatten(-2), (0, -size % BLOCK)).reshape(-1, BLOCK)


def counts(t: Tensor) -> int:
    return math.prod(scales_shape(t.shape))


def unblocked(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The reverse of `blocks` on a list of matrices."""
    found = []
    for part, t in zip(rows.split([counts(t) for t in like]), like, strict=True):
        flat = part.reshape(*t.shape[:-2], -1)[..., : t.shape[-2] * t.shape[-1]]
        found.append(flat.unflatten(-1, tuple(t.shape[-2:])))
    return found


# ---- batches -------------------------------------------------------------------------------------


def opened(batch: Batch, keys: Sequence[str], group: Mapping[str, Any]) -> Batch:
    """With the state of these names read into float32, in float64 beside float64 weights."""
    state = dict(batch.state)
    dtype = torch.promote_types(batch.params[0].dtype, torch.float32)
    for key in keys:
        if group["state_dtype"] == "8bit":
            read = dequantized(state[key], state[key + SCALES], key not in UNSIGNED)
            state[key] = [t.to(dtype) for t in read]
        else:
            state[key] = [t.to(dtype, copy=True) for t in state[key]]
    return batch._replace(state=state, kept=batch.state)


def parts(batch: Batch, keys: Sequence[str], group: Mapping[str, Any]) -> Iterator[Batch]:
    """What is opened at a time: as much as fits one work buffer, unless `prepare` saw it all."""
    if not keys or batch.kept is not None or not group["state_dtype"]:
        yield batch
        return
    for part in work_parts(batch.params):
        yield opened(batch.part([i for rows in part for i in rows]), keys, group)


def write(batch: Batch, keys: Sequence[str], group: dict[str, Any]) -> None:
    """Round the state of an opened batch to what is kept."""
    if batch.kept is None:
        return
    for key in keys:
        kept, new = batch.kept[key], batch.state[key]
        if group["state_dtype"] == "8bit":
            codes, scales = quantized(new, key not in UNSIGNED)
            torch._foreach_copy_(kept, codes)
            torch._foreach_copy_(batch.kept[key + SCALES], scales)
        elif group["stochastic_rounding"]:  # W <- 0 W + U, of the passes the one that rounds so
            one = torch.ones((), dtype=torch.float64, device=new[0].device)
            seed = group["rounding_seed"]
            decayed_update_.overload(kept, new, one, 1.0, [-1.0] * len(kept), seed)
        else:
            torch._foreach_copy_(kept, new)


def update(
    batch: Batch,
    keys: Sequence[str],
    group: dict[str, Any],
    rule: Callable[[Batch, dict[str, Any]], None],
) -> None:
    """`rule` on what is opened at a time; the matrices of a step share a seed."""
    for some in parts(batch, keys, group):
        rule(some, group)
        write(some, keys, group)
    if group["stochastic_rounding"]:
        group["rounding_seed"].add_(1)
