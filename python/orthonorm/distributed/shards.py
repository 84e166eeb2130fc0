"""The update of sharded parameters: rows of this rank, whole matrices at their owners."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.steps import work_parts
from ..optim.decay import decayed_update
from ..optim.momentum import updates_from
from ..optim.state import Batch, Updates, matrix_shapes, matrix_state_of
from ..optim.tensors import local, whole
from ..optim.views import VIEW_DEFAULTS, matrices
from .exchange import from_owners, to_owners
from .plan import Bucket, Item, buckets, cost, state_traveler, traveler

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer

FLAT = {"flatten": True}


def plan(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> list[Bucket]:
    """Buckets of sharded parameters; the same on every rank that agrees on the parameters."""
    kinds = [opt.alike(p, group) for p in params]
    key = [*map(id, params), *kinds, *(group[k] for k in VIEW_DEFAULTS)]
    if opt.plans.get(id(group), (None,))[0] != key:
        opt.plans[id(group)] = (key, new_plan(opt, params, group))
    for p in params:
        matrix_state_of(opt, p, group, matrix_shapes(opt, p, group))
    return opt.plans[id(group)][1]


def new_plan(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> list[Bucket]:
    opt.check_shardings(group)
    items = []
    for p in params:
        shapes = matrix_shapes(opt, p, group)
        travelers = [traveler(p)] * (1 + len(traveling(opt, group)))
        travelers += [state_traveler(p, shape) for _, named in shapes for *_, shape in named]
        items.append(Item(p, tuple(travelers), cost([x for x, _ in shapes])))
    return buckets(items, lambda p: opt.alike(p, group))


def traveling(opt: MatrixOptimizer, group: dict[str, Any]) -> list[str]:
    """Elementwise state that `direction` uses: all but the momentum, which shards know."""
    return [key for key in opt.elementwise_state(group) if key != opt.momentum_key]


def update(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> None:
    """Momentum on shards, directions of whole matrices at their owners, decay on shards."""
    device = bucket.items[0].param.device
    states: list[dict[str, Any]] = [opt.state[x.param] for x in bucket.items]
    if opt.counts_steps:
        for state in states:
            state["step"] = state.get("step", 0) + 1
    blocks = [torch.empty_like(local(x.param)) for x in bucket.items]
    rows, factors = shard_rows(opt, bucket, states, blocks, group)
    updates = Updates([u[None] for u in rows.owners])
    if rows.params:  # a rank may hold no row of a whole bucket
        mu = opt.momentum(group, device) if opt.momentum_key in rows.state else None
        updates_from(rows, updates.stacks, mu, group)
    if not opt.elementwise:
        exchange(opt, bucket, states, blocks, group)
    elif rows.params:
        updates = opt.direction(updates, rows, group)
    if rows.params:
        lr, rate = opt.scalar(group, "lr", device), opt.weight_decay(group)
        decayed_update(rows.params, updates.matrices, lr, rate, factors, group)


def shard_rows(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: list[dict[str, Any]],
    blocks: list[Tensor],
    group: dict[str, Any],
) -> tuple[Batch, list[float]]:
    """This rank's rows of every matrix, with the matrix's factor; `owners` are rows of `blocks`."""
    rows, factors = Batch([], [], {}, [], []), []
    for item, state, block in zip(bucket.items, states, blocks, strict=True):
        p, data = item.param, local(item.param)
        if data.numel() == 0:
            continue
        lists = {"param": data, "grad": local(p.grad), "update": block}
        if opt.momentum_key in opt.elementwise_state(group):
            lists["momentum"] = local(state[opt.momentum_key])
        views = {key: matrices(t, data, FLAT)[0] for key, t in lists.items()}
        if group["maximize"]:
            views["grad"] = -views["grad"]
        for x, start, length in cuts(bucket, item, group):
            if length == 0:
                continue
            cut = {key: t.narrow(0, start, length) for key, t in views.items()}
            rows.params.append(cut["param"])
            rows.grads.append(cut["grad"])
            rows.owners.append(cut["update"])
            if "momentum" in cut:
                rows.state.setdefault(opt.momentum_key, []).append(cut["momentum"])
            factors.append(opt.factor(x, p, group))
    return rows, factors


def cuts(bucket: Bucket, item: Item, group: dict[str, Any]) -> list[tuple[Tensor, int, int]]:
    """(matrix, first row, rows) of this rank's shard: its part of every matrix of a parameter."""
    p = item.param
    pieces = matrices(whole(p), whole(p), group)
    if len(pieces) == 1:
        return [(pieces[0], 0, local(p).shape[0])]
    dim, first, count = item.travelers[0].bounds(bucket.ranks, bucket.ranks.rank)
    if dim > 0:
        first, count = 0, p.shape[0]
    found, begin = [], 0
    for x in pieces:
        end = begin + x.shape[:-1].numel()
        low, high = max(begin, first), min(end, first + count)
        found.append((x, low - first, max(0, high - low)))
        begin = end
    return found


def exchange(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: list[dict[str, Any]],
    blocks: list[Tensor],
    group: dict[str, Any],
) -> None:
    """Replace the updates in `blocks` by directions, which owners compute."""
    carried = []
    for item, state, block in zip(bucket.items, states, blocks, strict=True):
        keys = [
            *traveling(opt, group),
            *(key for _, named in matrix_shapes(opt, item.param, group) for _, key, _ in named),
        ]
        carried.append([block, *(local(state[key]) for key in keys)])
    owned = to_owners(bucket, carried)
    directions(opt, bucket, states, owned, group)
    from_owners(bucket, owned, carried)


def directions(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: list[dict[str, Any]],
    owned: list[list[Tensor]],
    group: dict[str, Any],
) -> None:
    """Write the directions of the owned matrices over their updates."""
    batch, rank = Batch([], [], {}, [], []), bucket.ranks.rank
    steps = [s.get("step", 0) for x, s in zip(bucket.items, states, strict=True) if x.owner == rank]
    for item, tensors, step in zip(bucket.owned(rank), owned, steps, strict=True):
        update, *rest = tensors
        named = [name for _, named in matrix_shapes(opt, item.param, group) for name, *_ in named]
        pieces = matrices(update, update, group)
        batch.params.extend(pieces)
        batch.owners.extend([item.param] * len(pieces))
        batch.steps.extend([step if opt.counts_steps else 0] * len(pieces))
        keys = traveling(opt, group)
        for key, t in zip(keys, rest, strict=False):
            batch.state.setdefault(key, []).extend(matrices(t, update, group))
        for name, t in zip(named, rest[len(keys) :], strict=True):
            batch.state.setdefault(name, []).append(t)
    batch = batch._replace(grads=batch.params)
    for part in work_parts(batch.params):
        some = batch.part([i for rows in part for i in rows])
        stacks = [torch.stack([batch.params[i] for i in rows]) for rows in part]
        found = opt.direction(Updates(stacks), some, group)
        torch._foreach_copy_(some.params, found.matrices)
