"""The update of parameters that all ranks hold: owners compute directions, all do the rest."""

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
from ..optim.storage import matrix_dtype
from ..optim.tensors import Ranks, local
from .exchange import all_gather, read
from .plan import Bucket, Item, Traveler, cost
from .spread import Travel, finished

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


def item_of(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> Item:
    """Return the item of `p`: an owner sends its direction, and state that `direction` writes."""
    ranks, shapes = opt.company, matrix_shapes(opt, p, group)
    assert isinstance(ranks, Ranks)
    dtype = torch.float32 if halved(p, group) else p.dtype

    def whole(shape: tuple[int, ...], dtype: torch.dtype) -> Traveler:
        strides = torch.empty(shape, device="meta").stride()
        return Traveler(shape, strides, dtype, ranks.boxes(shape, ()))

    tensors = [(p.shape, dtype), *((p.shape, dtype) for _ in written(opt, group))]
    tensors += [(s, matrix_dtype(p, key)) for _, named in shapes for _, key, s in named]
    travelers = tuple(whole(tuple(shape), kind) for shape, kind in tensors)
    return Item(p, travelers, ranks.places, cost([x for x, _ in shapes]), company=ranks)


def written(opt: MatrixOptimizer, group: dict[str, Any]) -> list[str]:
    """Return keys of elementwise state that `direction` may write: all but the momentum."""
    return [key for key in opt.elementwise_state(group) if key != MOMENTUM]


def update(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> Travel[None]:
    """Step a bucket's parameters; other owners' momentum is updated while directions travel."""
    batch = matrix_batch(opt, [x.param for x in bucket.items], group)
    if opt.counts_steps:
        for p, t in zip(batch.owners, batch.steps, strict=True):
            opt.state[p]["step"] = t
    device, rank = batch.params[0].device, bucket.ranks.rank
    flags, lr = flags_of(opt, device), opt.scalar(group, "lr", device)
    mu = opt.momentum(group, device) if MOMENTUM in batch.state else None
    owner_of = {x.param: x.owner for x in bucket.items}
    owned: dict[int, list[int]] = {r: [] for r in range(bucket.ranks.size)}
    for i, p in enumerate(batch.owners):
        owned[owner_of[p]].append(i)
    results: dict[int, Tensor] = directions(opt, batch, owned[rank], mu, group, flags)
    gathered = all_gather(bucket, sent(opt, bucket, rank, owned[rank], results, group))
    next(gathered)
    results |= momenta(batch, [i for r in owned if r != rank for i in owned[r]], mu, group, flags)
    yield
    for r, data in enumerate(finished(gathered)):
        if r != rank:
            read(data, sent(opt, bucket, r, owned[r], results, group))
    updates, factors = [results[i] for i in range(len(batch.params))], opt.factors(batch, group)
    decayed_update(
        batch.params, updates, lr, opt.weight_decay(group, device), factors, group,
        flags.found_inf, batch.mantissas,
    )  # fmt: skip
    constrain_(batch.params, group, batch.state)


def sent(
    opt: MatrixOptimizer,
    bucket: Bucket,
    owner: int,
    indices: list[int],
    results: dict[int, Tensor],
    group: dict[str, Any],
) -> Iterator[Tensor]:
    """Yield what an owner sends, in order: directions of its matrices, then state."""
    yield from (results[i] for i in indices)
    for x in bucket.owned(owner):
        state = opt.state[x.param]
        named = [key for _, names in matrix_shapes(opt, x.param, group) for _, key, _ in names]
        yield from (local(state[key]) for key in (*written(opt, group), *named))


def stacks_of(batch: Batch, part: list[list[int]]) -> list[Tensor]:
    """Allocate memory for updates of matrices of a batch, in stacks of equal shapes."""
    dtype = torch.float32 if batch.mantissas else None
    firsts = [batch.params[indices[0]] for indices in part]
    return [w.new_empty((len(indices), *w.shape), dtype=dtype or w.dtype)
            for w, indices in zip(firsts, part, strict=True)]  # fmt: skip


def directions(
    opt: MatrixOptimizer,
    batch: Batch,
    indices: list[int],
    mu: Tensor | None,
    group: dict[str, Any],
    flags: Flags,
) -> dict[int, Tensor]:
    """Return directions of some matrices, as `MatrixOptimizer.update_alike` computes them."""
    results: dict[int, Tensor] = {}
    for part in work_parts([batch.params[i] for i in indices]):
        mine = [[indices[j] for j in stack] for stack in part]
        places = [i for stack in mine for i in stack]
        some = batch.part(places)
        with unless(flags.found_inf, some.written_by_rules(group)):
            updates = opt.directed(some, stacks_of(batch, mine), mu, group, flags)
        results |= zip(places, updates.matrices, strict=True)
    return results


def momenta(
    batch: Batch, indices: list[int], mu: Tensor | None, group: dict[str, Any], flags: Flags
) -> dict[int, Tensor]:
    """Update the momentum of some matrices, and return memory for their directions."""
    everything = [batch.params[i] for i in indices]
    (stacks,) = parts(everything, sum(w.numel() for w in everything)) if indices else ([],)
    part = [[indices[j] for j in stack] for stack in stacks]
    places, memory = [i for stack in part for i in stack], stacks_of(batch, part)
    if mu is not None and indices:
        some = batch.part(places)
        some = some._replace(state={MOMENTUM: some.state[MOMENTUM]})
        with unless(flags.found_inf, some.written_by_rules(group)):
            updates_from(some, memory, mu, group, flags)
    return dict(zip(places, (u for stack in memory for u in stack.unbind()), strict=True))
