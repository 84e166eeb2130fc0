"""Steps, and passes of steps, of rules without a polynomial.

They are made of other ops, which run where no kernel does all of it at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .normalize import column_normalize
from .passes import check_flags, decayed_update_, muon_prologue_, sign_
from .scaling import divide_each, magnitude
from .steps import parts, stacks_in_turn, work_parts


@op(
    "signum_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, "
    "Tensor momentum, Tensor weight_decay, float[] factors, bool nesterov=False, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    composite=True,
)
def signum_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """W <- (1 - lr wd) W - lr factor sign(U), U the (Nesterov) momentum: Signum's step on a list.

    It is muon_prologue_, sign_ and decayed_update_; their arguments mean the same here. A kernel
    does it in one pass, and so takes the sign of U before U is rounded.

    Shapes: entry i of the first three lists agree, (..., m, n).
    """
    by_part = work_parts(params)
    for part, stacks in zip(by_part, stacks_in_turn(params, by_part), strict=True):
        indices = [i for batch in part for i in batch]
        updates = [u for stack in stacks for u in stack.unbind()]
        weights, some = [params[i] for i in indices], [factors[i] for i in indices]
        states, given = [momentum_buffers[i] for i in indices], [grads[i] for i in indices]
        muon_prologue_(given, states, updates, momentum, nesterov, grad_scale, found_inf)
        sign_(stacks)
        decayed_update_(weights, updates, lr, weight_decay, some, None, found_inf)


@signum_step_.check
def _(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    name = "signum_step_"
    lists = dict(params=params, grads=grads, momentum_buffers=momentum_buffers)
    for label, values in lists.items():
        check.tensors(name, label, values, min_dim=2)
    check.same_shapes(name, **lists)
    check.same_lengths(name, params=params, factors=factors)
    for label, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        check.scalar(name, label, value, params)
    check_flags(name, params, grad_scale=grad_scale, found_inf=found_inf)


@op("normalize_columns_(Tensor(a!)[] out, Tensor[] X, float eps=0.0) -> ()", composite=True)
def normalize_columns_(out: list[Tensor], X: list[Tensor], eps: float = 0.0) -> None:
    """out_ij <- X_ij / (|X_:j|_2 + eps): `column_normalize` of a list, into existing memory.

    Shapes: X[i] and out[i] agree in shape and dtype, (..., m, n).
    """
    for part in parts(X, max((x.numel() for x in X), default=0)):
        for indices in part:
            normalized = column_normalize(torch.stack([X[i] for i in indices]), 1.0, eps)
            torch._foreach_copy_([out[i] for i in indices], list(normalized.unbind()))


@normalize_columns_.check
def _(out: list[Tensor], X: list[Tensor], eps: float = 0.0) -> None:
    name = "normalize_columns_"
    check.tensors(name, "out", out, min_dim=2)
    check.tensors(name, "X", X, min_dim=2)
    check.same_shapes(name, out=out, X=X)
    for i, (x, y) in enumerate(zip(X, out, strict=True)):
        check.same_dtype(name, **{f"X[{i}]": x, f"out[{i}]": y})
    check.number(name, "eps", eps, 0.0)


@op("mean_sinh_square(Tensor[] X, Tensor divisors) -> Tensor", composite=True)
def mean_sinh_square(X: list[Tensor], divisors: Tensor) -> Tensor:
    """mean_ij sinh(X_ij / d)^2 of every matrix, in float64; X_ij / 0 is 0.

    float64 makes results the same alone and in a stack. torch's float32 sinh of an entry depends
    on its place (in vectors, or at their ends), which changed bits; float64 errors are far below
    the rounding of a result.

    Shapes: X[i] is (..., m, n); divisors is 1-D, float64, one per matrix, and so is the result,
    batches flattened in list order. Of a matrix without elements the mean is 0.
    """
    if not X:
        return divisors.new_empty(0, dtype=torch.float64)
    found = []
    counts = [math.prod(x.shape[:-2]) for x in X]
    for x, d in zip(X, divisors.to(torch.float64).split(counts), strict=True):
        wide = divide_each(x, d, torch.float64).sinh_()
        found.append(magnitude([wide]).square() / max(math.prod(x.shape[-2:]), 1))
    return torch.cat(found)


@mean_sinh_square.check
def _(X: list[Tensor], divisors: Tensor) -> None:
    name = "mean_sinh_square"
    check.tensors(name, "X", X, min_dim=2)
    check.tensor(name, "divisors", divisors)
    count = sum(math.prod(x.shape[:-2]) for x in X)
    if check.shape(divisors) != (count,):
        raise ValueError(
            f"{name}: divisors must have a number for each of {count} matrices in X, "
            f"got shape {check.shape(divisors)}"
        )
    check.same_device(name, X=X, divisors=[divisors])
