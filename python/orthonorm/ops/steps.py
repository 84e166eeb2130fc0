"""Fused optimizer steps on lists of parameters: passes of `passes.py` around products.

Scheduled numbers (`lr`, `momentum`, `weight_decay`) are one-element tensors on the parameters'
device, so changing them neither recompiles nor synchronizes. No op writes a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .newton_schulz import check_iteration, newton_schulz_
from .normalize import check_moments, rotated_adam_, row_moment_
from .passes import check_flags, check_halves, decayed_update_, muon_prologue_
from .rotations import rotate_, rotate_back_


@op(
    "muon_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, "
    "Tensor momentum, Tensor weight_decay, float[] factors, float[] coefficients, int[] restarts, "
    'bool nesterov=True, str form="auto", str precision="auto", str scale="frobenius", '
    "float eps=0.0, float safety=1.0, Tensor? rounding=None, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, Tensor(c!)[]? mantissas=None) -> ()",
    composite=True,
)
def muon_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    coefficients: list[float],
    restarts: list[int],
    nesterov: bool = True,
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    """W <- (1 - lr wd) W - lr factor polar(U), U the (Nesterov) momentum: one Muon step on a list.

    It is muon_prologue_, newton_schulz_ and decayed_update_; their arguments mean the same here.
    Equal shapes are iterated as batches, as many at a time as fit one work buffer (`work_parts`).
    """
    how = (coefficients, restarts, form, precision, scale, eps, safety)
    flags = (grad_scale, found_inf)
    for indices, polars in _polars(grads, momentum_buffers, momentum, nesterov, how, flags):
        weights, some = [params[i] for i in indices], [factors[i] for i in indices]
        halves = None if mantissas is None else [mantissas[i] for i in indices]
        rest = (rounding, found_inf, halves)
        decayed_update_.overload(weights, polars, lr, weight_decay, some, *rest)


def _polars(
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    momentum: Tensor,
    nesterov: bool,
    how: tuple[list[float], list[int], str, str, str, float, float],
    flags: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Update momenta; yield (indices, polar factors of the updates U) for one part at a time.

    The factors lie in the part's work buffer, so they are valid until the next part.
    """
    by_part = work_parts(momentum_buffers)
    for part, batches in zip(by_part, stacks_in_turn(momentum_buffers, by_part), strict=True):
        indices = [i for batch in part for i in batch]
        states = [momentum_buffers[i] for i in indices]
        updates = [u for batch in batches for u in batch.unbind()]
        norms = muon_prologue_.overload(
            [grads[i] for i in indices], states, updates, momentum, nesterov, *flags
        )
        newton_schulz_.overload(batches, *how, norms)
        yield indices, updates


@op(
    "normuon_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] row_moments, Tensor lr, Tensor momentum, Tensor weight_decay, float[] factors, "
    "float beta2, float norm_eps, float[] coefficients, int[] restarts, bool nesterov=True, "
    'str form="auto", str precision="auto", str scale="frobenius", float eps=0.0, '
    "float safety=1.0) -> ()",
    composite=True,
)
def normuon_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    row_moments: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    beta2: float,
    norm_eps: float,
    coefficients: list[float],
    restarts: list[int],
    nesterov: bool = True,
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
) -> None:
    """W <- (1 - lr wd) W - lr factor N, N = O / (sqrt(v) + norm_eps) at |O|_F, O = polar(U).

    It is NorMuon's step on a list (zichongli5/NorMuon): `muon_step_` with `row_moment_` between its
    polynomial and its update. Their arguments mean the same here. A kernel may sum the rows'
    squares at the end of the polynomial's last product, before O is rounded.

    Shapes: W, G and B of entry i are (..., m, n), v (..., m, 1).
    """
    how = (coefficients, restarts, form, precision, scale, eps, safety)
    for indices, polars in _polars(grads, momentum_buffers, momentum, nesterov, how):
        row_moment_.overload([row_moments[i] for i in indices], polars, beta2, norm_eps)
        some = [factors[i] for i in indices]
        decayed_update_.overload([params[i] for i in indices], polars, lr, weight_decay, some)


WORK = 5 * 2**20  # elements of a CPU's buffer: enough small matrices to keep every thread busy
ACCELERATOR_WORK = 2**27  # elements: all of GPT-2 small in one launch per op; 512 MiB of float32


def work_parts(tensors: list[Tensor], most: int | None = None) -> list[list[list[int]]]:
    """Return `parts` of a list that each fit one work buffer: of WORK elements on a CPU (`most` if
    that is less), ACCELERATOR_WORK elsewhere, or as many as the largest tensor has."""
    if not tensors:
        return []
    limit = min(WORK, most or WORK) if tensors[0].device.type == "cpu" else ACCELERATOR_WORK
    return parts(tensors, max(*(t.numel() for t in tensors), limit))


def stacks_in_turn(
    tensors: list[Tensor], by_part: list[list[list[int]]], dtype: torch.dtype | None = None
) -> Iterator[list[Tensor]]:
    """Yield for each part its work buffers (k, *shape), of dtype `dtype` or the tensors' own.

    All parts use the same memory: new pages, which the system clears, take longer than the passes.
    """

    def batches(part: list[list[int]]) -> Iterator[tuple[torch.dtype, int]]:
        for indices in part:
            yield dtype or tensors[indices[0]].dtype, len(indices) * tensors[indices[0]].numel()

    needed: dict[torch.dtype, int] = {}
    for part in by_part:
        together: dict[torch.dtype, int] = {}
        for kind, size in batches(part):
            together[kind] = together.get(kind, 0) + size
        needed.update({k: max(n, needed.get(k, 0)) for k, n in together.items()})
    rooms = {kind: _room(tensors[0], kind, size) for kind, size in needed.items()}
    for part in by_part:
        stacks, used = [], dict.fromkeys(needed, 0)
        for indices, (kind, size) in zip(part, batches(part), strict=True):
            room = rooms[kind].narrow(0, used[kind], size)
            stacks.append(room.view(len(indices), *tensors[indices[0]].shape))
            used[kind] += size
        yield stacks
    for kind, room in rooms.items():
        if _keepable(room):
            _left[kind] = room


KEPT = 2**25  # elements of the largest buffer that is kept
_left: dict[torch.dtype, Tensor] = {}  # work buffers on the CPU, kept from one step for the next


def _room(like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    found = _left.pop(dtype, None) if _keepable(like) else None
    if found is None or not size <= found.numel() <= max(4 * size, WORK):
        found = like.new_empty(size, dtype=dtype)
    return found


def _keepable(t: Tensor) -> bool:
    """True if a buffer may be kept for the next step: plain CPU memory of up to KEPT elements.

    SCALE's step takes 2.6 ms so, and 4.1 ms with new memory (llama-3m on a Xeon, 2026-11).
    """
    plain = type(t) in check.PLAIN and t.device.type == "cpu"
    return plain and t.numel() <= KEPT and not (torch.compiler.is_compiling() or t.is_inference())


def parts(tensors: list[Tensor], limit: int) -> list[list[list[int]]]:
    """Group indices into batches of equal shapes, and these into parts of `limit` elements."""
    kinds: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        kinds.setdefault((t.shape, t.dtype), []).append(i)
    found: list[list[list[int]]] = []
    room = 0
    for (shape, _), indices in kinds.items():
        size = max(1, math.prod(shape))
        while indices:
            if room < size:
                found.append([])
                room = limit
            count = max(1, min(len(indices), room // size))
            found[-1].append(indices[:count])
            indices = indices[count:]
            room -= count * size
    return found


def _check_muon(
    name: str,
    lists: dict[str, list[Tensor]],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    how: tuple[list[float], list[int], str, str, str, float, float],
) -> None:
    for label, values in lists.items():
        check.tensors(name, label, values, min_dim=2)
    params = lists["params"]
    check.same_shapes(name, **lists)
    check.same_lengths(name, params=params, factors=factors)
    for label, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        check.scalar(name, label, value, params)
    check_iteration(name, lists["grads"], *how)


@muon_step_.check
def _(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    coefficients: list[float],
    restarts: list[int],
    nesterov: bool = True,
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mantissas: list[Tensor] | None = None,
) -> None:
    lists = dict(params=params, grads=grads, momentum_buffers=momentum_buffers)
    how = (coefficients, restarts, form, precision, scale, eps, safety)
    _check_muon("muon_step_", lists, lr, momentum, weight_decay, factors, how)
    check.seed("muon_step_", "rounding", rounding, params)
    check_flags("muon_step_", params, grad_scale=grad_scale, found_inf=found_inf)
    if mantissas is not None:
        check_halves("muon_step_", params, mantissas, rounding)


@normuon_step_.check
def _(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    row_moments: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    factors: list[float],
    beta2: float,
    norm_eps: float,
    coefficients: list[float],
    restarts: list[int],
    nesterov: bool = True,
    form: str = "auto",
    precision: str = "auto",
    scale: str = "frobenius",
    eps: float = 0.0,
    safety: float = 1.0,
) -> None:
    lists = dict(params=params, grads=grads, momentum_buffers=momentum_buffers)
    how = (coefficients, restarts, form, precision, scale, eps, safety)
    _check_muon("normuon_step_", lists, lr, momentum, weight_decay, factors, how)
    check_moments("normuon_step_", params, row_moments=row_moments)
    check.fraction("normuon_step_", "beta2", beta2)
    check.number("normuon_step_", "norm_eps", norm_eps, 0.0)


@op(
    "conda_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor[] bases, Tensor scales, Tensor lr, float beta1, float beta2, "
    "float eps, Tensor weight_decay) -> ()",
    composite=True,
)
def conda_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    bases: list[Tensor],
    scales: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
) -> None:
    """W <- (1 - lr wd) (W - scale Q N), N = M / (sqrt(V) + eps) in the rotated basis: a Conda step.

    It takes a piece of a matrix's long side at a time: `rotate_` G into a buffer, `rotated_adam_`
    on it, `rotate_back_` into W. M and V are in rotated coordinates, which is exact as long as Q
    stays the same (arXiv:2509.24218). The optimizer refreshes Q. `scales` holds the step size of
    each matrix, 1-D float64: lr * scale * bias correction.

    Shapes: W, G, M, V of entry i are (..., m, n), Q (..., k, k) with k = min(m, n).
    """
    cuts = [pieces(w.shape) for w in params]
    largest = max(
        (exp_avg[i].narrow(*c).numel() for i, cut in enumerate(cuts) for c in cut), default=0
    )
    dtypes = dict.fromkeys(m.dtype for m in exp_avg)
    buffers = {dtype: lr.new_empty(largest, dtype=dtype) for dtype in dtypes}
    decay = 1 - lr.to(torch.float64) * weight_decay.to(torch.float64)
    steps = scales * decay
    for i, cut in enumerate(cuts):
        for dim, begin, length in cut:
            w, g, m, v = (t[i] for t in (params, grads, exp_avg, exp_avg_sq))
            if len(cut) > 1:
                w, g, m, v = (t.narrow(dim, begin, length) for t in (w, g, m, v))
            work = buffers[m.dtype][: m.numel()].view(m.shape)
            rotate_.overload(work, g, bases[i])
            rotated_adam_.overload([m], [v], [work], beta1, beta2, eps, steps[i : i + 1])
            rotate_back_.overload(w, work, bases[i], decay)


PIECE = 2**20  # elements: products run at full speed, in less memory than most matrices have


def pieces(shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (dimension, begin, length) of pieces of the long side, about PIECE elements each."""
    dim = -1 if shape[-1] >= shape[-2] else -2
    long = shape[dim]
    length = max(512, PIECE // max(1, math.prod(shape) // max(1, long)))
    count = max(1, -(-long // length))
    length = max(1, -(-long // count))
    return [(dim, begin, min(length, long - begin)) for begin in range(0, long, length)]


@conda_step_.check
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    bases: list[Tensor],
    scales: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
) -> None:
    name = "conda_step_"
    lists = dict(params=params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for label, values in lists.items():
        check.tensors(name, label, values, min_dim=2)
    check.same_shapes(name, **lists)
    check.tensors(name, "bases", bases, min_dim=2)
    check.same_lengths(name, params=params, bases=bases)
    for i, (w, q, m) in enumerate(zip(params, bases, exp_avg, strict=True)):
        k = min(w.shape[-2:])
        check.equal_shape(name, f"bases[{i}]", q, (*w.shape[:-2], k, k))
        check.same_dtype(name, **{f"bases[{i}]": q, f"exp_avg[{i}]": m})
    check.tensor(name, "scales", scales)
    check.equal_shape(name, "scales", scales, (len(params),))
    check.scalar(name, "lr", lr)
    check.scalar(name, "weight_decay", weight_decay)
    rates = [scales, lr, weight_decay]
    check.same_device(name, params=params, bases=bases, rates=rates)
    check.fraction(name, "beta1", beta1)
    check.fraction(name, "beta2", beta2)
    check.number(name, "eps", eps, 0.0)
