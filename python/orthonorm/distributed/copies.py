"""The update of parameters that all ranks hold: directions by owners, all else by everyone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.steps import parts, work_parts
from ..optim.amp import Flags, flags_of, unless
from ..optim.batches import matrix_batch
from ..optim.constraints import constrain_
from ..optim.decay import decayed_update
from ..optim.momentum import updates_from
from ..optim.state import MOMENTUM, Batch, halved, matrix_shapes
from ..optim.tensors import Ranks, local
from .exchange import all_gather, read
from .plan import Bucket, Item, Traveler, cost
from .spread import Travel, finished

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


def item_of(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> Item:
    """What an owner sends of a parameter: its direction, and the state that `direction` writes."""
    ranks, shapes = opt.company, matrix_shapes(opt, p, group)
    assert isinstance(ranks, Ranks)
    dtype = torch.float32 if halved(p, group) else p.dtype

    def whole(shape: tuple[int, ...]) -> Traveler:
        strides = torch.empty(shape, device="meta").stride()
        return Traveler(shape, strides, dtype, ranks.boxes(shape, ()))

    sizes = [p.shape, *(p.shape for _ in written(opt, group))]
    sizes += [shape for _, named in shapes for *_, shape in named]
    travelers = tuple(whole(tuple(shape)) for shape in sizes)
    return Item(p, travelers, ranks.places, cost([x for x, _ in shapes]), company=ranks)


def written(opt: MatrixOptimizer, group: dict[str, Any]) -> list[str]:
    """State of the parameter's shape that `direction` may write: all but the momentum."""
    return [key for key in opt.elementwise_state(group) if key != MOMENTUM]


def update(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> Travel[None]:
    """The step of a bucket's parameters; the momentum of those of others meanwhile."""
    batch = matrix_batch(opt, [x.param for x in bucket.items], group)
    if opt.counts_steps:
        for p, t in zip(batch.owners, batch.steps, strict=True):
            opt.state[p]["step"] = t
    device, rank = batch.params[0].device, bucket.ranks.rank
    flags, lr = flags_of(opt, device), opt.scalar(group, "lr", device)
    mu = opt.momentum(group, device) if MOMENTUM in batch.state else None
    of = {x.param: x.owner for x in bucket.items}
    rows: dict[int, list[int]] = {r: [] for r in range(bucket.ranks.size)}
    for i, p in enumerate(batch.owners):
        rows[of[p]].append(i)
    found: dict[int, Tensor] = directions(opt, batch, rows[rank], mu, group, flags)
    gathered = all_gather(bucket, sent(opt, bucket, rank, rows[rank], found, group))
    next(gathered)
    found |= momenta(batch, [i for r in rows if r != rank for i in rows[r]], mu, group, flags)
    yield
    for r, data in enumerate(finished(gathered)):
        if r != rank:
            read(data, sent(opt, bucket, r, rows[r], found, group))
    updates, factors = [found[i] for i in range(len(batch.params))], opt.factors(batch, group)
    decayed_update(
        batch.params, updates, lr, opt.weight_decay(group), factors, group, flags.found_inf,
        batch.mantissas,
    )  # fmt: skip
    constrain_(batch.params, group, batch.state)


def sent(
    opt: MatrixOptimizer,
    bucket: Bucket,
    owner: int,
    rows: list[int],
    found: dict[int, Tensor],
    group: dict[str, Any],
) -> Iterator[Tensor]:
    """What an owner sends, in order: directions, of rows of the batch, and state."""
    yield from (found[i] for i in rows)
    for x in bucket.owned(owner):
        state = opt.state[x.param]
        named = [key for _, names in matrix_shapes(opt, x.param, group) for _, key, _ in names]
        yield from (local(state[key]) for key in (*written(opt, group), *named))


def stacks_of(batch: Batch, part: list[list[int]]) -> list[Tensor]:
    """New memory for the updates of matrices of a batch, in stacks of equal shapes."""
    dtype = torch.float32 if batch.mantissas else None
    firsts = [batch.params[rows[0]] for rows in part]
    return [w.new_empty((len(rows), *w.shape), dtype=dtype or w.dtype)
            for w, rows in zip(firsts, part, strict=True)]  # fmt: skip


def directions(
    opt: MatrixOptimizer,
    batch: Batch,
    rows: list[int],
    mu: Tensor | None,
    group: dict[str, Any],
    flags: Flags,
) -> dict[int, Tensor]:
    """The directions of some matrices, as `MatrixOptimizer.update_alike` computes them."""
    found: dict[int, Tensor] = {}
    for part in work_parts([batch.params[i] for i in rows]):
        mine = [[rows[j] for j in stack] for stack in part]
        places = [i for stack in mine for i in stack]
        some = batch.part(places)
        with unless(flags.found_inf, some.written_by_rules(group)):
            updates = opt.directed(some, stacks_of(batch, mine), mu, group, flags)
        found |= zip(places, updates.matrices, strict=True)
    return found


def momenta(
    batch: Batch, rows: list[int], mu: Tensor | None, group: dict[str, Any], flags: Flags
) -> dict[int, Tensor]:
    """Update the momentum of some matrices; memory for their directions."""
    everything = [batch.params[i] for i in rows]
    (stacks,) = parts(everything, sum(w.numel() for w in everything)) if rows else ([],)
    part = [[rows[j] for j in stack] for stack in stacks]
    places, memory = [i for stack in part for i in stack], stacks_of(batch, part)
    if mu is not None and rows:
        some = batch.part(places)
        some = some._replace(state={MOMENTUM: some.state[MOMENTUM]})
        with unless(flags.found_inf, some.written_by_rules(group)):
            updates_from(some, memory, mu, group, flags)
    return dict(zip(places, (u for stack in memory for u in stack.unbind()), strict=True))
