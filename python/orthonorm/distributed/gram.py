"""Updates of matrices that are cut along their long side, by sums of their Gram matrices.

Every rank makes the Gram matrix of its part (n x n, n the short side). From the sum all ranks
compute the same factor and apply it to their parts: updates travel nowhere. A rule can take part in
two ways. Its direction is a polar factor, followed by `after_polar` (Muon, Scion, NorMuon). Or its
`prepare` sums Gram matrices over `batch.spread`, and its `update` acts on each line of the long
side alone (Conda, one-sided SOAP).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import divide_each
from ..ops.normalize import accumulator
from ..ops.words import triples_of
from ..optim.state import Batch, matrix_shapes, widened
from ..optim.tensors import local, sharded_dims
from ..optim.views import is_matrix
from ..orthogonalize import choose
from ..polar import Polynomial
from .plan import Bucket, Item, Traveler
from .spread import Part, Spread, Travel

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer

States = list[dict[str, Any]]


def spread_of(opt: MatrixOptimizer, item: Item, group: dict[str, Any]) -> Item:
    """Return the item, with `spread` set if its ranks are to sum Gram matrices.

    This needs method="gram", and that less is sent than with owners. Every rank then computes for
    every matrix, work that owners would divide. Results are no longer one process's bit for bit.
    """
    p: Any = item.param
    if group.get("method") != "gram" or not (opt.on_shards(group) or opt.on_lines(group)):
        return item
    dims = sharded_dims(p)
    if p.dim() != 2 or len(dims) != 1 or not is_matrix(group):
        return item
    if p.shape[p.placements[dims[0]].dim] == min(p.shape):
        return item
    sums = opt.sums(p, group, 2)  # step 2 is an ordinary one: rare refreshes begin with step 1
    if sums is None:
        return item
    among, ranks = p.device_mesh.size(dims[0]), range(len(item.replicas))
    both_ways = 2 * sum(sums.bytes) * (among - 1) / among  # bytes that a rank sends in a ring
    to = sum(t.bytes(r) for r in ranks[1:] if item.sends(r) for t in item.travelers)
    back = sum(t.bytes(r) for r in ranks[1:] for t in item.travelers if t.returns)
    if both_ways >= (to + back) / len(ranks):
        return item
    return item._replace(spread=Spread(p.device_mesh.get_group(dims[0])))


def iterated_dtype(p: Any, dtype: torch.dtype, polynomial: Polynomial) -> torch.dtype:
    """Return the dtype in which one process would iterate an update of `p` that has `dtype`."""
    like = torch.empty(1, dtype=dtype, device=p.device).expand(p.shape)
    triples = triples_of(polynomial.coefficients)
    return choose(like, triples, polynomial.restarts, "gram", polynomial.precision).dtype


def directions(
    opt: MatrixOptimizer,
    bucket: Bucket,
    states: States,
    blocks: list[Tensor],
    group: dict[str, Any],
) -> Travel[None]:
    """Replace the updates in `blocks` (this rank's parts of the matrices) by their directions."""
    p, spread = opt.polar_first(bucket.items[0].param, group), bucket.spread
    assert p is not None and spread is not None
    norms = yield from spread.norms(blocks)
    parts = []
    for x, block, norm in zip(bucket.items, blocks, norms.unbind(), strict=True):
        dtype = iterated_dtype(x.param, block.dtype, p)
        divisor = (p.safety * norm.clamp(min=group["eps"])).reshape(1)
        y = divide_each(block, divisor, dtype) if block.numel() else block.to(dtype)
        parts.append(y.mT if rows_cut(x.param) else y)
    dtype = accumulator(bucket.items[0].param)
    parts = yield from spread.polynomial(parts, triples_of(p.coefficients), p.restarts, dtype)
    for x, block, y in zip(bucket.items, blocks, parts, strict=True):
        block.copy_(y.mT if rows_cut(x.param) else y)
    small = small_state(opt, bucket, states, group)
    rank = bucket.ranks.rank
    yield from opt.after_polar(
        [Part(tuple(x.param.shape), x.travelers[0].boxes[rank], block,
              {name: t for name, (t, _, _) in some.items()})
         for x, block, some in zip(bucket.items, blocks, small, strict=True)], spread, group
    )  # fmt: skip
    keep(small, rank)


def rows_cut(p: Any) -> bool:
    """True if the ranks divide the rows, so that columns are the short side."""
    return bool(p.placements[sharded_dims(p)[0]].dim % 2 == 0)


# ---- small state: whole tensors of each matrix, zero outside the block that this rank keeps ------

Small = list[
    dict[str, tuple[Tensor, Tensor, Traveler]]
]  # of every item, by name: whole tensor, this rank's state, its traveler


def small_state(
    opt: MatrixOptimizer, bucket: Bucket, states: States, group: dict[str, Any]
) -> Small:
    """Return tensors whose sums over the ranks are the whole tensors of `matrix_state`."""
    found: Small = []
    for item, state in zip(bucket.items, states, strict=True):
        ((_, named),) = matrix_shapes(opt, item.param, group)
        some = {}
        for (name, key, shape), place in zip(
            named, item.travelers[len(item.travelers) - len(named) :], strict=True
        ):
            kept = local(state[key])
            t = kept.new_zeros(shape)
            place.block(t, bucket.ranks.rank).copy_(kept)
            some[name] = (t, kept, place)
        found.append(some)
    return found


def keep(small: Small, rank: int) -> None:
    """Copy this rank's blocks of the whole tensors into its state."""
    for some in small:
        for t, kept, place in some.values():
            kept.copy_(place.block(t, rank))


# ---- rules that work on lines of the long side ---------------------------------------------------


def update_lines(opt: MatrixOptimizer, bucket: Bucket, group: dict[str, Any]) -> Travel[None]:
    """Make the whole update of this rank's parts; state of the short sides is summed first."""
    states: States = [opt.state[x.param] for x in bucket.items]
    small, spread = small_state(opt, bucket, states, group), bucket.spread
    assert spread is not None
    tensors = [t for some in small for t, _, _ in some.values() if t.numel()]
    if tensors:
        sums = yield from spread.sums([t.to(accumulator(t)) for t in tensors])
        torch._foreach_copy_(tensors, sums)
    batch, originals = Batch([], [], {}, [], [], spread=spread), list[tuple[Tensor, Tensor]]()
    for item, state, some in zip(bucket.items, states, small, strict=True):
        p: Any = item.param
        grad = local(p.grad).float() if widened(p, group) else local(p.grad)
        lines = {"param": local(p), "grad": -grad if group["maximize"] else grad}
        lines |= {key: local(state[key]) for key in opt.elementwise_state(group)}
        padded = {key: lengthened(t, p) for key, t in lines.items()}
        originals += [(lines[k], padded[k]) for k in lines if k != "grad"]
        batch.params.append(padded["param"])
        batch.grads.append(padded["grad"])
        batch.owners.append(p)
        batch.steps.append(state.get("step", 0) + 1)
        for key in opt.elementwise_state(group):
            batch.state.setdefault(key, []).append(padded[key])
        for name, (t, _, _) in some.items():
            batch.state.setdefault(name, []).append(t)
    batch = batch._replace(prepared=opt.prepare(batch, group))
    if opt.counts_steps:
        for state in states:
            state["step"] = state.get("step", 0) + 1
    opt.update(batch, {**group, "telemetry": 0})  # off: it measures whole matrices, not parts
    keep(small, bucket.ranks.rank)
    for t, longer in originals:
        if longer is not t:
            t.copy_(longer[: t.shape[0], : t.shape[1]])


def lengthened(t: Tensor, p: Any) -> Tensor:
    """Return the part with zero lines appended, so that its long side is that of the matrix."""
    rows, columns = t.shape
    if rows_cut(p):
        return t if rows >= columns else F.pad(t, (0, 0, 0, columns - rows))
    return t if columns > rows else F.pad(t, (0, rows + 1 - columns))
