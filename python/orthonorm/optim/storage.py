"""State kept in another dtype than its parameter's: in float32 beside parameters of 16 bits, or
smaller than it is computed with, in bfloat16 or in 8 bits by block-wise dynamic codes.

What 8 bits mean is said in `ops/blocks.py`.

A step reads smaller state into float32 (one work buffer for as many matrices as fit one; where a
rule has `prepare`, all of it), computes as it would with float32 state, and rounds once when it
writes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import decayed_update_, dequantize_blocks_, quantize_blocks_
from ..ops.steps import work_parts

if TYPE_CHECKING:
    from .state import Batch

SCALES = "_scales"
UNSIGNED = ("exp_avg_sq", "second_moment")
SMALLER = ("bfloat16", "8bit")
STATE_DTYPES = (None, "float32", *SMALLER)
# Elements that a rule of single passes is given at a time: fewer new pages, which cost AdamW's step
# on one thread a quarter (3 million elements, beside other work; 2026-11).
PASS = 2**20


Rooms = dict[tuple[str, torch.dtype], Tensor]


def opened(
    batch: Batch, keys: Sequence[str], group: Mapping[str, Any], rooms: Rooms | None = None
) -> Batch:
    """With the state of these names read into float32, in float64 beside float64 weights; 8 bits
    into memory in `rooms`, which calls use in turn."""
    state = dict(batch.state)
    dtype = torch.promote_types(batch.params[0].dtype, torch.float32)
    for key in keys:
        if group["state_dtype"] == "8bit":
            codes, scales = state[key], state[key + SCALES]
            state[key] = room({} if rooms is None else rooms, (key, dtype), codes)
            dequantize_blocks_.unchecked(state[key], codes, scales, key not in UNSIGNED)
        else:
            state[key] = [t.to(dtype, copy=True) for t in state[key]]
    return batch._replace(state=state, kept=batch.state)


def room(rooms: Rooms, kind: tuple[str, torch.dtype], like: list[Tensor]) -> list[Tensor]:
    """Tensors of the shapes of others, in one piece of memory: new pages, which the system clears,
    took longer than the passes over them."""
    sizes = [t.numel() for t in like]
    if kind not in rooms or rooms[kind].numel() < sum(sizes):
        rooms[kind] = like[0].new_empty(sum(sizes), dtype=kind[1])
    pieces = rooms[kind].narrow(0, 0, sum(sizes)).split(sizes)
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def parts(
    batch: Batch, keys: Sequence[str], group: Mapping[str, Any], most: int | None
) -> Iterator[Batch]:
    """What is opened at a time: as much as fits one work buffer, unless `prepare` saw it all."""
    if not keys or batch.kept is not None or group["state_dtype"] not in SMALLER:
        yield batch
        return
    rooms: Rooms = {}
    for part in work_parts(batch.params, most):
        yield opened(batch.part([i for rows in part for i in rows]), keys, group, rooms)


def write(batch: Batch, keys: Sequence[str], group: dict[str, Any]) -> None:
    """Round the state of an opened batch to what is kept."""
    if batch.kept is None:
        return
    for key in keys:
        kept, new = batch.kept[key], batch.state[key]
        if group["state_dtype"] == "8bit":
            quantize_blocks_.unchecked(kept, batch.kept[key + SCALES], new, key not in UNSIGNED)
        elif group["stochastic_rounding"]:  # W <- 0 W + U, of the passes the one that rounds so
            one = torch.ones((), dtype=torch.float64, device=new[0].device)
            seed = group["rounding_seed"]
            decayed_update_.unchecked(kept, new, one, 1.0, [-1.0] * len(kept), seed)
        else:
            torch._foreach_copy_(kept, new)


def update(
    batch: Batch,
    keys: Sequence[str],
    group: dict[str, Any],
    rule: Callable[[Batch, dict[str, Any]], None],
    elementwise: bool,
) -> None:
    """`rule` on what is opened at a time; the matrices of a step share a seed."""
    for some in parts(batch, keys, group, PASS if elementwise else None):
        rule(some, group)
        write(some, keys, group)
    if group["stochastic_rounding"]:
        group["rounding_seed"].add_(1)
