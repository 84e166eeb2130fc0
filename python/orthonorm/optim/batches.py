"""Batches for rules. They are built anew every step, since gradients are new tensors then.

Python's objects leave the caches between kernels, so the lists are built one field at a time, in
few loops. For 28 parameters that took a third of Python's share of a step (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .._checks import PLAIN
from .constraints import NORMALIZE
from .state import (
    MANTISSA,
    Batch,
    Shapes,
    halved,
    matrix_shapes,
    matrix_state_of,
    widened,
)
from .storage import matrix_dtype
from .tensors import is_distributed, local, views_here
from .views import is_matrix, matrices

if TYPE_CHECKING:
    from .base import MatrixOptimizer

T = TypeVar("T")


def matrix_batch(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> Batch:
    """Return a batch of matrix views of parameters whose matrices are whole on this rank."""
    halves = [halved(p, group) for p in params] if group.get("mantissa") else [False] * len(params)
    known = made_states(opt, params, halves, group)
    states = [opt.state[p] for p in params]
    plain = all(type(p) in PLAIN and p.dim() == 2 for p in params)
    own = plain and is_matrix(group)  # each is one matrix
    like = [] if own else [(local(p), views_here(p, group)) for p in params]
    counts = [len(matrices(data, data, views)) for data, views in like]

    def seen(tensors: list[Tensor]) -> list[Tensor]:
        """Return the matrix views of tensors, one tensor per parameter."""
        if own:
            return tensors
        pairs = zip(tensors, like, strict=True)
        return [x for t, (data, views) in pairs for x in matrices(local(t), data, views)]

    def each(values: list[T]) -> list[T]:
        """Repeat values, one per parameter, for all of its matrices."""
        if own:
            return values
        return [v for v, n in zip(values, counts, strict=True) for _ in range(n)]

    grads: list[Any] = [p.grad for p in params]
    rest: list[Any] = []
    if not opt.self_contained and (group["state_dtype"] == "float32" or any(halves)):
        # float32, as a float32 weight's gradients are: rules read batch.grads
        pairs = zip(grads, params, strict=True)
        grads = [local(g).float() if widened(p, group) else g for g, p in pairs]
    if any(halves):
        found = seen([s.get(MANTISSA, p) for s, p in zip(states, params, strict=True)])
        rest = [x if half else None for x, half in zip(found, each(halves), strict=True)]
    state = {key: seen([s[key] for s in states]) for key in opt.elementwise_state(group)}
    if known:
        for p, s in zip(params, states, strict=True):
            for _, names in known[p.shape]:
                for name, key, _ in names:
                    state.setdefault(name, []).append(local(s[key]))
    steps = [s.get("step", 0) + 1 for s in states] if opt.counts_steps else [0] * len(params)
    grads = seen(grads)
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    return Batch(seen(params), grads, state, each(params), each(steps), halves=rest)


def made_states(
    opt: MatrixOptimizer, params: list[Tensor], halves: list[bool], group: dict[str, Any]
) -> dict[Any, Shapes]:
    """Make missing state; return `matrix_shapes` by parameter shape, {} if no state needs them."""
    keys = {*opt.elementwise_state(group)}
    pairs = [(opt.state[p], half) for p, half in zip(params, halves, strict=True)]
    whole = not torch.compiler.is_compiling() and all(  # dynamo knows less of sets (torch 2.13)
        have.keys() >= keys and (not half or MANTISSA in have) for have, half in pairs
    )
    plain = group["state_dtype"] != "8bit" and group["constraint"] != NORMALIZE
    if whole and not opt.has_matrix_state and plain:
        return {}
    known: dict[Any, Shapes] = {}  # asking per parameter took a tenth of Signum's step (2026-11)
    for p in params:
        if p.shape not in known:
            known[p.shape] = matrix_shapes(opt, p, group)
    wanted = {
        shape: [*keys, *(key for _, names in found for _, key, _ in names)]
        for shape, found in known.items()
    }
    lacking = [
        p
        for p, (have, half) in zip(params, pairs, strict=True)
        if any(key not in have for key in wanted[p.shape]) or (half and MANTISSA not in have)
    ]
    if lacking:
        zeros = zeros_in_stacks(opt, lacking, known)
        for p in lacking:
            matrix_state_of(opt, p, group, known[p.shape], zeros.get(p))
    return known


def zeros_in_stacks(
    opt: MatrixOptimizer, params: list[Tensor], known: Mapping[Any, Shapes]
) -> dict[Tensor, dict[str, Tensor]]:
    """Return {parameter: {key: zeros}} for matrices of new parameters, cut from shared stacks.

    Tensors of one shape lie in one stack (stacks.py).
    """
    alike: dict[Any, list[tuple[Tensor, str]]] = {}
    found: dict[Tensor, dict[str, Tensor]] = {}
    for p in params:
        if opt.state.get(p) or is_distributed(p) or torch.compiler.is_compiling():
            continue  # inputs of a compiled graph should not share memory
        found[p] = {}
        for x, named in known[p.shape]:
            for name, key, shape in named:
                own = matrix_dtype(p, key)
                alike.setdefault((name, x.shape, shape, own, p.device), []).append((p, key))
    for (_, _, shape, dtype, device), places in alike.items():
        zeros = torch.zeros((len(places), *shape), dtype=dtype, device=device)
        for (p, key), z in zip(places, zeros.unbind(), strict=True):
            found[p][key] = z
    return found
