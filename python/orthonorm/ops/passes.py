"""Passes over lists of tensors, of which optimizer steps are made.

Scheduled numbers (`lr`, `momentum`, `weight_decay`) are one-element tensors on the parameters'
device, so changing them neither recompiles nor synchronizes. No op writes a gradient.

The two numbers of torch.amp.GradScaler are such tensors too. The gradients given are the true ones
times `grad_scale`. If `found_inf` is not 0, weights, state and step counts stay as they are, to the
bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .mantissa import joined, split_
from .normalize import accumulator
from .rounding import write
from .scaling import norms_of

BF16 = torch.bfloat16


def kept(found_inf: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """Return `new`, or if `found_inf` is not 0 `old` in the dtype of `new`."""
    if found_inf is None:
        return new
    return torch.where(found_inf.to(new.device).reshape(()) != 0, old.to(new.dtype), new)


def unscaled(g: Tensor, grad_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return g / grad_scale, as GradScaler.unscale_ does: g times the inverse, taken in float64."""
    if grad_scale is None:
        return g.to(dtype)
    return g.to(dtype) * grad_scale.to(g.device, torch.float64).reshape(()).reciprocal().to(dtype)


def check_flags(name: str, beside: list[Tensor], **flags: Tensor | None) -> None:
    for label, value in flags.items():
        if value is not None:
            check.scalar(name, label, value, beside)


@op(
    "muon_prologue_(Tensor[] grads, Tensor(a!)[] momentum_buffers, Tensor(b!)[] updates, "
    "Tensor momentum, bool nesterov=True, Tensor? grad_scale=None, Tensor? found_inf=None) "
    "-> Tensor"
)
def muon_prologue_(
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    updates: list[Tensor],
    momentum: Tensor,
    nesterov: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """B <- mu B + (1-mu) G;  U = mu B + (1-mu) G if nesterov else B;  returns |U|_F.

    One pass reads G and B, writes B and U (in the dtype of `updates`), and measures U before it is
    rounded, as `magnitude` does. U is written whatever `found_inf` is.

    Shapes: entry i of the three lists agree, (..., m, n); the norms are 1-D float64.
    """
    norms = []
    for g, b, u in zip(grads, momentum_buffers, updates, strict=True):
        dtype = accumulator(g, b, u)
        mu = momentum.to(dtype)
        x, old = unscaled(g, grad_scale, dtype), b.to(dtype)
        new = x + mu * (old - x)
        out = x + mu * (new - x) if nesterov else new
        b.copy_(kept(found_inf, b, new))
        u.copy_(out)
        norms.append(out)
    return norms_of(norms)


@muon_prologue_.check
def _(
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    updates: list[Tensor],
    momentum: Tensor,
    nesterov: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    name = "muon_prologue_"
    check.tensors(name, "grads", grads, min_dim=2)
    check.tensors(name, "momentum_buffers", momentum_buffers, min_dim=2)
    check.tensors(name, "updates", updates, min_dim=2)
    check.same_shapes(name, grads=grads, momentum_buffers=momentum_buffers, updates=updates)
    check.scalar(name, "momentum", momentum, grads)
    check_flags(name, grads, grad_scale=grad_scale, found_inf=found_inf)


@op("sign_(Tensor(a!)[] X) -> ()")
def sign_(X: list[Tensor]) -> None:
    """X <- sign(X), 0 where X is 0, and NaN where X is not finite.

    torch.sign returns 0 for NaN, which would hide it.

    Shapes: any; X is overwritten.
    """
    for x in X:
        x.copy_(x.sign() + (x - x))


@sign_.check
def _(X: list[Tensor]) -> None:
    check.tensors("sign_", "X", X)


@op(
    "decayed_update_(Tensor(a!)[] params, Tensor[] updates, Tensor lr, Tensor weight_decay, "
    "float[] factors, Tensor? rounding=None, Tensor? found_inf=None, "
    "Tensor(b!)[]? mantissas=None) -> ()"
)
def decayed_update_(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    rounding: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    """W_i <- (1 - lr weight_decay) W_i - lr factor_i U_i, in one pass, rounded once.

    `rounding`, one int64 number, is the seed of stochastic rounding of bfloat16 weights
    (`rounding.py`); None rounds to nearest. With `mantissas`, W_i is the float32 number that a
    bfloat16 weight and its int16 mantissa hold together (`mantissa.py`).

    Shapes: W_i, U_i and mantissas[i] agree, any number of dimensions; factors has one number per
    tensor.
    """
    for i, (w, u, factor) in enumerate(zip(params, updates, factors, strict=True)):
        old = w if mantissas is None else joined(w, mantissas[i])
        dtype = accumulator(old, u)
        rate = lr.to(torch.float64)
        decay = (1 - rate * weight_decay.to(torch.float64)).to(dtype)
        step = (rate * factor).to(dtype)
        new = kept(found_inf, old, decay * old.to(dtype) - step * u.to(dtype))
        if mantissas is None:
            write(w, new, rounding)
        else:
            split_(w, mantissas[i], new.to(torch.float32))


@decayed_update_.check
def _(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    rounding: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    name = "decayed_update_"
    check.tensors(name, "params", params)
    check.tensors(name, "updates", updates)
    check.same_shapes(name, params=params, updates=updates)
    check.same_lengths(name, params=params, factors=factors)
    check.scalar(name, "lr", lr, params)
    check.scalar(name, "weight_decay", weight_decay, params)
    check.seed(name, "rounding", rounding, params)
    check_flags(name, params, found_inf=found_inf)
    if mantissas is not None:
        check_halves(name, params, mantissas, rounding)


def check_halves(
    name: str, params: list[Tensor], mantissas: list[Tensor], rounding: Tensor | None
) -> None:
    if rounding is not None:
        raise ValueError(f"{name}: rounding must be None beside mantissas, which lose nothing")
    for label, values, dtype in (("params", params, BF16), ("mantissas", mantissas, torch.int16)):
        for i, t in enumerate(values):
            if not isinstance(t, Tensor) or t.dtype != dtype:
                got = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name}: {label}[{i}] must be {dtype} with mantissas, got {got}")
    check.same_shapes(name, params=params, mantissas=mantissas)


@op(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] steps, Tensor lr, float beta1, float beta2, float eps, "
    "Tensor weight_decay, bool decay_first=True, bool correct_eps=True, "
    "Tensor? rounding=None, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "Tensor(e!)[]? mantissas=None) -> ()"
)
def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
    decay_first: bool = True,
    correct_eps: bool = True,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    """W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), m and v decayed averages of G and G^2.

    Increments each parameter's step count t, then corrects bias: m^ = m / (1-beta1^t),
    v^ = v / (1-beta2^t). `correct_eps=True` adds eps to sqrt(v^) (torch.optim.AdamW); False adds it
    to the uncorrected sqrt(v) (Conda's companion, transformers). `decay_first=False` decays the
    updated weight instead of the old one (Conda decays last). `rounding` and `mantissas` are those
    of `decayed_update_`.

    Shapes: entry i of the first four lists, and of mantissas, agree; steps[i] has one element,
    float32 or float64.
    """
    lists = zip(params, grads, exp_avg, exp_avg_sq, steps, strict=True)
    for i, (w, g, m, v, step) in enumerate(lists):
        step.copy_(kept(found_inf, step, step + 1))
        t = step.to(torch.float64)
        rate = lr.to(torch.float64)
        correct1, correct2 = 1 - beta1**t, (1 - beta2**t).sqrt()
        whole = w if mantissas is None else joined(w, mantissas[i])
        dtype = accumulator(whole, g, m, v)
        x = unscaled(g, grad_scale, dtype)
        new_m = beta1 * m.to(dtype) + (1 - beta1) * x
        new_v = beta2 * v.to(dtype) + (1 - beta2) * x * x
        size = (rate * correct2 / correct1).to(dtype)
        denominator = new_v.sqrt() + (eps * correct2 if correct_eps else rate * 0 + eps).to(dtype)
        update = size * new_m / denominator
        update = torch.where(denominator == 0, 0.0, update)
        decay = (1 - rate * weight_decay.to(torch.float64)).to(dtype)
        old = whole.to(dtype)
        new = decay * old - update if decay_first else decay * (old - update)
        new = kept(found_inf, whole, new)
        if mantissas is None:
            write(w, new, rounding)
        else:
            split_(w, mantissas[i], new.to(torch.float32))
        m.copy_(kept(found_inf, m, new_m))
        v.copy_(kept(found_inf, v, new_v))


@adamw_step_.check
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
    decay_first: bool = True,
    correct_eps: bool = True,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    name = "adamw_step_"
    lists = dict(params=params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for label, values in lists.items():
        check.tensors(name, label, values)
    check.same_shapes(name, **lists)
    numbers = (lr, beta1, beta2, eps, weight_decay)
    check_adamw(name, params, steps, numbers, rounding, grad_scale, found_inf)
    if mantissas is not None:
        check_halves(name, params, mantissas, rounding)


def check_adamw(
    name: str,
    params: list[Tensor],
    steps: list[Tensor],
    numbers: tuple[Tensor, float, float, float, Tensor],
    rounding: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Check what AdamW's step takes besides lists of tensors."""
    lr, beta1, beta2, eps, weight_decay = numbers
    check.tensors(name, "steps", steps)
    check.same_lengths(name, params=params, steps=steps)
    for step in steps:
        check.scalar(name, "steps", step)
    check.scalar(name, "lr", lr, params)
    check.fraction(name, "beta1", beta1)
    check.fraction(name, "beta2", beta2)
    check.number(name, "eps", eps, 0.0)
    check.scalar(name, "weight_decay", weight_decay, params)
    check.seed(name, "rounding", rounding, params)
    check_flags(name, params, grad_scale=grad_scale, found_inf=found_inf)
    if found_inf is not None:  # no host reads it, so steps must be counted on the device
        check.same_device(name, params=params, steps=steps)
