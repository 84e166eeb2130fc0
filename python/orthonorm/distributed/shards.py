"""The update of sharded parameters: this rank's rows here, whole matrices at their owners."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.steps import work_parts
from ..optim.constraints import constrain_
from ..optim.decay import decayed_update
from ..optim.momentum import updates_from
from ..optim.state import (
    MOMENTUM,
    Batch,
    Updates,
    matrix_shapes,
    matrix_state_of,
    widened,
    working_dtype,
)
from ..optim.storage import matrix_dtype
from ..optim.tensors import local, ranks_of, state_placements, whole
from ..optim.views import VIEW_DEFAULTS, matrices
from . import copies, gram
from .agreement import all_succeed
from .company import shared
from .exchange import Tensors, from_owners, interleaved, to_owners
from .plan import Bucket, Item, buckets, cost, state_traveler, traveler
from .spread import Travel

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer


def plan(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> list[Bucket]:
    """Return the buckets of sharded parameters, and make state that is missing.

    Buckets are kept until parameters or settings change. They are the same on every rank that
    agrees on the parameters.
    """
    kinds = [opt.alike(p, group) for p in params]
    settings = [
        group.get(k) for k in (*VIEW_DEFAULTS, "method", "mantissa", "state_dtype", "constraint")
    ]
    ways = (opt.on_shards(group), opt.on_lines(group), opt.polar_first(params[0], group))
    key = [*map(id, params), *kinds, *settings, *ways]
    if opt.plans.get(id(group), (None,))[0] != key:
        opt.plans[id(group)] = (key, new_plan(opt, params, group))
    for p in params:
        if not shared(opt, p, group):
            matrix_state_of(opt, p, group, matrix_shapes(opt, p, group))
    return opt.plans[id(group)][1]


def new_plan(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> list[Bucket]:
    return buckets((item_of(opt, p, group) for p in params), lambda p: opt.alike(p, group))


def item_of(opt: MatrixOptimizer, p: Any, group: dict[str, Any]) -> Item:
    if shared(opt, p, group):
        return copies.item_of(opt, p, group)
    shapes, ranks = matrix_shapes(opt, p, group), ranks_of(p)
    like, dtype = traveler(p, ranks), working_dtype(p, group)
    working = like._replace(dtype=dtype)  # for updates, and state of the parameter's shape
    first = [working] if opt.on_shards(group) else [like, traveler(p, ranks, returns=False)]
    states = [
        state_traveler(matrix_dtype(p, key), ranks, shape, state_placements(p, x.dim() - 2))
        for x, named in shapes for _, key, shape in named
    ]  # fmt: skip
    travelers = (*first, *(working for _ in traveling(opt, group)), *states)
    item = Item(p, travelers, ranks.replicas(p.placements), cost([x for x, _ in shapes]))
    return gram.spread_of(opt, item, group)


def traveling(opt: MatrixOptimizer, group: dict[str, Any]) -> list[str]:
    """Return keys of elementwise state that owners need; not the momentum if shards update it."""
    skipped = MOMENTUM if opt.on_shards(group) else None
    return [key for key in opt.elementwise_state(group) if key != skipped]


def update(opt: MatrixOptimizer, plan: list[Bucket], group: dict[str, Any]) -> None:
    interleaved(way(opt, bucket, group)(opt, bucket, group) for bucket in plan)


def way(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> Callable[..., Travel[None]]:
    """Return the function that updates a bucket."""
    if bucket.copies:
        return copies.update
    if opt.on_shards(group):
        return update_rows
    return update_whole if bucket.spread is None else gram.update_lines


# ---- momentum and decay on rows, directions at owners --------------------------------------------


def update_rows(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> Travel[None]:
    """Update this rank's rows; owners, or sums of Gram matrices, give their directions."""
    device = bucket.items[0].param.device
    states: list[dict[str, Any]] = [opt.state[x.param] for x in bucket.items]
    count(opt, states)
    blocks = [
        torch.empty_like(local(x.param), dtype=working_dtype(x.param, group)) for x in bucket.items
    ]
    rows, factors = shard_rows(opt, bucket, states, blocks, group)
    updates = Updates([u.unsqueeze(0) for u in rows.owners])
    if rows.params:  # a rank may hold no row of a whole bucket
        mu = opt.momentum(group, device) if MOMENTUM in rows.state else None
        updates_from(rows, updates.stacks, mu, group)
    if bucket.spread is not None:
        yield from gram.directions(opt, bucket, states, blocks, group)
    elif not opt.elementwise:
        keys = traveling(opt, group)
        carried = [
            [block, *(local(t) for t in state_of(opt, x, state, keys, group))]
            for x, state, block in zip(bucket.items, states, blocks, strict=True)
        ]
        owned = yield from to_owners(bucket, carried)
        directions(opt, bucket, states, owned, group)
        yield from from_owners(bucket, owned, carried)
    elif rows.params:
        updates = opt.direction(updates, rows, group)
    if rows.params:
        lr, rate = opt.scalar(group, "lr", device), opt.weight_decay(group, device)
        decayed_update(rows.params, updates.matrices, lr, rate, factors, group)


def count(opt: MatrixOptimizer, states: list[dict[str, Any]]) -> None:
    """Add 1 to the step count of every state, if the rule counts steps."""
    if opt.counts_steps:
        for state in states:
            state["step"] = state.get("step", 0) + 1


def state_of(
    opt: MatrixOptimizer, item: Item, state: dict[str, Any], keys: list[str], group: dict[str, Any]
) -> list[Tensor]:
    """Return the state that travels, in the order of the item's travelers."""
    named = [key for _, names in matrix_shapes(opt, item.param, group) for _, key, _ in names]
    return [state[key] for key in (*keys, *named)]


def shard_rows(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: list[dict[str, Any]],
    blocks: list[Tensor],
    group: dict[str, Any],
) -> tuple[Batch, list[float]]:
    """Return this rank's rows of every matrix, and the factor of each such matrix.

    In this batch `owners` holds the rows of `blocks`, to which the updates are written, and `state`
    the momentum, or all elementwise state of a rule whose directions are made here.
    """
    rows, factors = Batch([], [], {}, [], []), []
    for item, state, block in zip(bucket.items, states, blocks, strict=True):
        p, data = item.param, local(item.param)
        if data.numel() == 0:
            continue
        keys = [k for k in opt.elementwise_state(group) if opt.elementwise or k == MOMENTUM]
        form = {"flatten": True, "transpose": turned(p, group)}
        tensors = (data, local(p.grad), block, *(local(state[key]) for key in keys))
        views = [matrices(t, data, form)[0] for t in tensors]
        if group["maximize"]:
            views[1] = -views[1]
        for x, start, length in cuts(bucket, item, group):
            if length == 0:
                continue
            w, g, u, *kept = (t.narrow(0, start, length) for t in views)
            rows.params.append(w)
            rows.grads.append(g)
            rows.owners.append(u)
            rows.steps.append(state["step"] if opt.counts_steps else 0)
            for key, t in zip(keys, kept, strict=True):
                rows.state.setdefault(key, []).append(t)
            factors.append(opt.factor(x, p, group))
    return rows, factors


def cuts(bucket: Bucket, item: Item, group: dict[str, Any]) -> list[tuple[Tensor, int, int]]:
    """Return (matrix, first row, number of rows) of this rank's part of every matrix.

    Rows are counted in the shard. A matrix of which this rank has no row has 0 of them.
    """
    p = item.param
    pieces = matrices(whole(p), whole(p), group)
    first, count = item.travelers[0].boxes[bucket.ranks.rank][1 if turned(p, group) else 0]
    if len(pieces) == 1:
        return [(pieces[0], 0, count)]
    parts, begin = [], 0
    for x in pieces:
        end = begin + x.shape[:-1].numel()
        low, high = max(begin, first), min(end, first + count)
        parts.append((x, low - first, max(0, high - low)))
        begin = end
    return parts


def turned(p: Tensor, group: dict[str, Any]) -> bool:
    """True if rows of the matrices of `p` are its columns; stacks are cut as they are stored."""
    return bool(group["transpose"]) and p.dim() == 2


def directions(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: list[dict[str, Any]],
    owned: Tensors,
    group: dict[str, Any],
) -> None:
    """Write the directions of the owned matrices over their updates."""
    batch = whole_matrices(opt, bucket, states, owned, group)
    batch = batch._replace(grads=batch.params)
    for part in work_parts(batch.params):
        some = batch.part([i for indices in part for i in indices])
        stacks = [torch.stack([batch.params[i] for i in indices]) for indices in part]
        results = opt.direction(Updates(stacks), some, group)
        torch._foreach_copy_(some.params, results.matrices)


# ---- everything at owners ------------------------------------------------------------------------


def update_whole(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> Travel[None]:
    """Make the whole update at owners: parameters, gradients and all state travel to them."""
    states: list[dict[str, Any]] = [opt.state[x.param] for x in bucket.items]
    keys, carried = traveling(opt, group), []
    for x, state in zip(bucket.items, states, strict=True):
        tensors = (x.param, x.param.grad, *state_of(opt, x, state, keys, group))
        carried.append([local(t) for t in tensors])
    owned = yield from to_owners(bucket, carried)
    batch = whole_matrices(opt, bucket, states, owned, group)
    with all_succeed(opt.name, bucket.ranks, bucket.items[0].param.device):
        if batch.params:
            batch = batch._replace(prepared=opt.prepare(batch, group))
    count(opt, states)
    if batch.params:
        opt.update(batch, group)
        constrain_(batch.params, group, batch.state)
    yield from from_owners(bucket, owned, carried)


def whole_matrices(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: list[dict[str, Any]],
    owned: Tensors,
    group: dict[str, Any],
) -> Batch:
    """Return the batch of owned matrices; its `params` are the updates if only those travel."""
    batch, rank = Batch([], [], {}, [], []), bucket.ranks.rank
    keys, only_updates = traveling(opt, group), opt.on_shards(group)
    mine = [s for x, s in zip(bucket.items, states, strict=True) if x.owner == rank]
    for item, state, tensors in zip(bucket.owned(rank), mine, owned, strict=True):
        named = [name for _, named in matrix_shapes(opt, item.param, group) for name, *_ in named]
        first, rest = tensors[0], tensors[1 if only_updates else 2 :]
        pieces = matrices(first, first, group)
        batch.params.extend(pieces)
        if not only_updates:
            grad = tensors[1].float() if widened(item.param, group) else tensors[1]
            batch.grads.extend(matrices(grad, first, group))
        batch.owners.extend([item.param] * len(pieces))
        step = state.get("step", 0) + (not only_updates) if opt.counts_steps else 0
        batch.steps.extend([step] * len(pieces))
        for key, t in zip(keys, rest, strict=False):
            batch.state.setdefault(key, []).extend(matrices(t, first, group))
        for name, t in zip(named, rest[len(keys) :], strict=True):
            batch.state.setdefault(name, []).append(t)
    if group["maximize"] and not only_updates:
        batch = batch._replace(grads=[-g for g in batch.grads])
    return batch
