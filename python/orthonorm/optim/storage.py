"""State stored in another dtype than its parameter's.

It may be float32 beside parameters of 16 bits, as state of matrices (bases, Gram matrices, row
moments) always is. State of the parameter's shape may also be smaller than the arithmetic's dtype:
bfloat16, or 8 bits by block-wise dynamic codes (`ops/blocks.py`).

A step reads smaller state into float32, computes as with float32 state, and rounds once when it
writes back. It reads as many matrices at a time as fit one work buffer, or all of them for a rule
that has `prepare`. AdamW's op reads and writes 8-bit state itself.
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
# Elements at a time for an elementwise rule, so that few new memory pages are touched: these took
# a quarter of AdamW's step on one thread (3 million elements, beside other work; 2026-11).
PASS = 2**20


def matrix_dtype(p: Tensor, key: str) -> torch.dtype:
    """Return the dtype of a state tensor of matrices (`matrix_state`): at least float32.

    An average in bfloat16 stands still once what is added is 1/256 of it, and Gram matrices
    overflow float16. Scales of 8-bit state are always float32.
    """
    return torch.float32 if SCALES in key else torch.promote_types(p.dtype, torch.float32)


Rooms = dict[tuple[str, torch.dtype], Tensor]


def opened(
    batch: Batch, keys: Sequence[str], group: Mapping[str, Any], rooms: Rooms | None = None
) -> Batch:
    """Return the batch with the state of these names read into float32 (float64 for float64).

    8-bit state is read into the memory in `rooms`, which the next call with it overwrites.
    """
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


def seed_of(group: Mapping[str, Any]) -> Tensor | None:
    """Return the seed of this step's stochastic rounding, which all its matrices share, or None."""
    return group["rounding_seed"] if group["stochastic_rounding"] else None


def room(rooms: Rooms, kind: tuple[str, torch.dtype], like: list[Tensor]) -> list[Tensor]:
    """Return uninitialized tensors of the shapes of `like` in one piece of memory of `rooms`.

    It is reused: new pages, which the system clears, took longer than the passes over them.
    """
    sizes = [t.numel() for t in like]
    if kind not in rooms or rooms[kind].numel() < sum(sizes):
        rooms[kind] = like[0].new_empty(sum(sizes), dtype=kind[1])
    pieces = rooms[kind].narrow(0, 0, sum(sizes)).split(sizes)
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def parts(
    batch: Batch, keys: Sequence[str], group: Mapping[str, Any], most: int | None
) -> Iterator[Batch]:
    """Yield parts of a batch, opened; the batch itself if nothing needs opening or all is open."""
    if not keys or batch.kept is not None or group["state_dtype"] not in SMALLER:
        yield batch
        return
    rooms: Rooms = {}
    for part in work_parts(batch.params, most):
        yield opened(batch.part([i for indices in part for i in indices]), keys, group, rooms)


def write(batch: Batch, keys: Sequence[str], group: dict[str, Any]) -> None:
    """Round the state of an opened batch into the stored state."""
    if batch.kept is None:
        return
    for key in keys:
        kept, new = batch.kept[key], batch.state[key]
        if group["state_dtype"] == "8bit":
            quantize_blocks_.unchecked(kept, batch.kept[key + SCALES], new, key not in UNSIGNED)
        elif (seed := seed_of(group)) is not None:  # W <- 0 W + U, by the pass that rounds so
            one = torch.ones((), dtype=torch.float64, device=new[0].device)
            decayed_update_.unchecked(kept, new, one, one, [-1.0] * len(kept), seed)
        else:
            torch._foreach_copy_(kept, new)


def update(
    batch: Batch,
    keys: Sequence[str],
    group: dict[str, Any],
    rule: Callable[[Batch, dict[str, Any]], None],
    elementwise: bool,
) -> None:
    """Apply `rule` to one opened part after another."""
    for some in parts(batch, keys, group, PASS if elementwise else None):
        rule(some, group)
        write(some, keys, group)
