"""Peers of each op in torch itself, as a user would write them; packages are in `packages.py`.

A peer that mutates its arguments does so as our op does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from orthonorm._library import LOADED
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim import _muon
from torch.optim.adamw import adamw

from . import packages
from .candidates import (
    PRODUCT,
    Peer,
    Running,
    Unavailable,
    run_calls,
    start_floor,
    start_part,
    start_product,
    start_reference,
    start_triton,
)
from .cases import Case, Outputs
from .inputs import Arguments


def _one_triple(arguments: Arguments) -> tuple[tuple[float, float, float], int]:
    """Return (triple, steps); raise Unavailable if the steps have different triples."""
    flat = arguments["coefficients"]
    triples = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    if len(set(triples)) != 1:
        raise Unavailable("torch.optim.Muon takes one (a, b, c) for all steps")
    return triples[0], len(triples)


def _torch_polynomial(case: Case, calls: list[Arguments]) -> Running:
    """Start torch.optim.Muon's function (bf16, direct form) on every matrix of every batch."""
    (arguments,) = calls
    triple, steps = _one_triple(arguments)
    matrices = [m for x in arguments["X"] for m in x.reshape(-1, *x.shape[-2:])]
    f = _muon._zeropower_via_newtonschulz

    def outputs(polars: list[Tensor]) -> Outputs:
        left, result = iter(polars), []
        for x in arguments["X"]:
            members = [next(left) for _ in range(x[..., 0, 0].numel())]
            result.append(torch.stack(members).view(x.shape) if members else x)
        return {"result": result}

    return Running(lambda: [f(m, triple, steps, 1e-7) for m in matrices], outputs, dtype="bfloat16")


def _polar(x: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    return U @ Vh


def _torch_polar(case: Case, calls: list[Arguments]) -> Running:
    """Start the exact polar factor, U V^T by an SVD."""
    (arguments,) = calls
    X = arguments["X"]
    wide = X if all(x.dtype.itemsize > 2 for x in X) else [x.float() for x in X]
    name = "float64" if wide[0].dtype == torch.float64 else "float32"
    return Running(
        lambda: [_polar(x) for x in wide], lambda r: {"result": r}, dtype=name, same=False
    )


def _torch_muon_step(case: Case, calls: list[Arguments]) -> Running:
    """Start torch.optim.Muon's step function."""
    (a,) = calls
    triple, steps = _one_triple(a)
    if any(w.dim() != 2 for w in a["params"]):
        raise Unavailable("torch.optim.Muon takes 2-D parameters only")
    settings: dict[str, Any] = dict(
        weight_decay=float(a["weight_decay"]), momentum=float(a["momentum"]), eps=1e-7,
        has_complex=False, nesterov=a.get("nesterov", True), ns_coefficients=triple, ns_steps=steps,
    )  # fmt: skip
    if any(factor != 1.0 for factor in a["factors"]):
        raise Unavailable("torch.optim.Muon has no factor per matrix")
    names = ("params", "grads", "momentum_buffers")
    call = functools.partial(
        _muon.muon, *(a[n] for n in names), lr=float(a["lr"]), adjust_lr_fn="none", **settings
    )
    outputs = ("params", "momentum_buffers")
    return Running(call, lambda _: {n: a[n] for n in outputs}, dtype="bfloat16")


def _torch_adamw(case: Case, calls: list[Arguments], fused: bool) -> Running:
    """Start torch.optim.AdamW's step function."""
    (a,) = calls
    if len({t.dtype for n in ("params", "exp_avg") for t in a[n]}) > 1:
        raise Unavailable("torch.optim.AdamW keeps its states in the parameters' dtype")
    call = functools.partial(
        adamw, a["params"], a["grads"], a["exp_avg"], a["exp_avg_sq"], [], a["steps"],
        fused=fused, foreach=False, amsgrad=False, maximize=False, beta1=a["beta1"],
        beta2=a["beta2"], lr=float(a["lr"]), weight_decay=float(a["weight_decay"]),
        eps=a["eps"],
    )  # fmt: skip
    return Running(call, lambda _: {n: a[n] for n in ("params", "exp_avg", "exp_avg_sq")})


def _torch_power(case: Case, calls: list[Arguments]) -> Running:
    """Start the power method of torch's spectral_norm parametrization, then sigma = u . W v."""
    (a,) = calls
    if any(w.dim() != 2 for w in a["W"]):
        raise Unavailable("torch's spectral_norm takes one matrix at a time")
    if a.get("order", "u_first") != "u_first":
        raise Unavailable("torch's parametrization updates u first")
    modules = []
    for w, u, v in zip(a["W"], a["u"], a["v"], strict=True):
        module = _SpectralNorm(w[:1, :1])  # a 1x1 matrix, as its constructor takes 15 power steps
        module._u, module._v = u.clone(), v.clone()
        modules.append((module, w))
    steps = a.get("steps", 1)

    def call() -> list[Tensor]:
        sigmas = []
        with torch.no_grad():
            for module, w in modules:
                module._power_method(w, steps)
                sigmas.append(torch.vdot(module._u, torch.mv(w, module._v)))
        return sigmas

    def outputs(sigmas: list[Tensor]) -> Outputs:
        us, vs = ([getattr(m, n) for m, _ in modules] for n in ("_u", "_v"))
        return {"u": us, "v": vs, "result": [torch.stack(sigmas)]}

    return Running(call, outputs)


def _eager_conda(case: Case, calls: list[Arguments]) -> Running:
    """Start Conda's rule as in its authors' code: momentum not rotated, three products.

    Source: arXiv:2509.24218 and its code.
    """
    (a,) = calls
    if a["grads"] and a["grads"][0].dtype != a["exp_avg"][0].dtype:
        raise Unavailable("the authors' code keeps its states in the parameters' dtype")
    tall = [w.shape[-2] >= w.shape[-1] for w in a["params"]]
    momenta = [
        m @ q.mT if t else q @ m for m, q, t in zip(a["exp_avg"], a["bases"], tall, strict=True)
    ]
    decay = 1 - float(a["lr"]) * float(a["weight_decay"])
    sizes, beta1, beta2 = a["scales"].tolist(), a["beta1"], a["beta2"]
    entries = list(
        zip(a["params"], a["grads"], momenta, a["exp_avg_sq"], a["bases"], sizes, tall, strict=True)
    )

    def call() -> None:
        for w, g, m, v, q, size, right in entries:
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            rotated, direction = (g @ q, m @ q) if right else (q.mT @ g, q.mT @ m)
            v.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
            normalized = direction / v.sqrt().add_(a["eps"])
            w.add_(normalized @ q.mT if right else q @ normalized, alpha=-size)
            if decay != 1:
                w.mul_(decay)

    return Running(call, lambda _: {"params": a["params"], "exp_avg_sq": a["exp_avg_sq"]})


def _torch_symmetric_update(
    C: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    if C.dim() == 2:
        return torch.addmm(C, A, B, beta=beta, alpha=alpha)
    return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


def _torch_apply(X: Tensor, B: Tensor, a: float, b: float = 1.0) -> Tensor:
    return _torch_symmetric_update(X, B, X, alpha=b, beta=a)


def _torch_normalize(
    X: Tensor, scale: float = 1.0, eps: float = 0.0, eps_at: str = "", dim: int = -1
) -> Tensor:
    return torch.nn.functional.normalize(X, dim=dim, eps=eps)


def _torch_prologue(
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    updates: list[Tensor],
    momentum: Tensor,
    nesterov: bool = True,
) -> Tensor:
    """Do the two lerps of torch.optim.Muon and the norm that it takes in bf16."""
    mu, norms = float(momentum), []
    for i, (g, b) in enumerate(zip(grads, momentum_buffers, strict=True)):
        b.lerp_(g.to(b.dtype), 1 - mu)
        updates[i].copy_(g.to(b.dtype).lerp(b, mu) if nesterov else b)
        norms.append(torch.linalg.matrix_norm(updates[i]).reshape(-1))
    return torch.cat(norms)


def _torch_update(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: list[float],
) -> None:
    """Do the decay and the update of torch.optim.Muon, its last two lines."""
    rate, decay = float(lr), float(weight_decay)
    for w, u, factor in zip(params, updates, factors, strict=True):
        w.mul_(1 - rate * decay)
        w.add_(u, alpha=-rate * factor)


def _plain(label: str, f: Any, same: bool = True) -> Peer:
    """Return the peer of a torch function that takes our op's arguments.

    `same` is True if it computes the same numbers. Otherwise it is exact where ours is not, and
    slow.
    """

    def start(case: Case, calls: list[Arguments]) -> Running:
        return run_calls(f, case, calls)._replace(same=same)

    return Peer(label, "torch" if same else "exact", start)


def _magnitudes(X: list[Tensor]) -> Tensor:
    return torch.cat([torch.linalg.matrix_norm(x).reshape(-1) for x in X])


def _largest(W: Tensor, **_: Any) -> Tensor:
    return torch.linalg.matrix_norm(W.float(), 2)


TRITON = Peer("Triton", "backend", start_triton)
PART = Peer("CUDA part", "backend", start_part)
REFERENCE = Peer("reference", "reference", start_reference)
FLOOR = Peer("memory floor", "floor", start_floor)
CEILING = Peer(f"torch.mm of {PRODUCT}", "floor", start_product)
_POLYNOMIAL = Peer("torch.optim.Muon's function", "torch", _torch_polynomial)
_EXACT = Peer("torch.linalg.svd", "exact", _torch_polar)
_FUSED = functools.partial(_torch_adamw, fused=True)
_LOOP = functools.partial(_torch_adamw, fused=False)

TORCH: dict[str, tuple[Peer, ...]] = {
    "gram": (_plain("torch X @ X.mT", lambda X: X @ X.mT),),
    "symmetric_update": (_plain("torch addmm", _torch_symmetric_update),),
    "apply": (_plain("torch addmm", _torch_apply),),
    "small_newton_schulz": (_POLYNOMIAL, _EXACT, *packages.POLYNOMIALS),
    "newton_schulz": (_POLYNOMIAL, _EXACT, *packages.POLYNOMIALS),
    "row_normalize": (_plain("torch F.normalize", _torch_normalize),),
    "column_normalize": (
        _plain("torch F.normalize", functools.partial(_torch_normalize, dim=-2)),
    ),
    "power_iteration_": (Peer("torch spectral_norm", "torch", _torch_power),),
    "spectral_norm": (_plain("torch matrix_norm(2)", _largest, same=False),),
    "gram_iteration": (_plain("torch matrix_norm(2)", _largest, same=False),),
    "magnitude": (_plain("torch matrix_norm", _magnitudes),),
    "muon_prologue_": (_plain("torch lerp, lerp", _torch_prologue),),
    "decayed_update_": (_plain("torch mul, add", _torch_update),),
    "adamw_step_": (
        Peer("torch AdamW(fused)", "torch", _FUSED), Peer("torch AdamW(loop)", "torch", _LOOP),
    ),
    "muon_step_": (Peer("torch.optim.Muon", "torch", _torch_muon_step),),
    "conda_step_": (Peer("eager, three products", "torch", _eager_conda),),
}  # fmt: skip


def peers(case: Case, calls: list[Arguments]) -> tuple[Peer, ...]:
    """Return all peers of our op; the last one is its limit, memory or arithmetic."""
    arithmetic = any(case.flops(arguments) for arguments in calls)
    twin = (TRITON,) if LOADED.served.get((case.name, "CUDA")) == "CUDA" else ()
    part = (PART,) if (case.name, "CUDA") in LOADED.parts else ()
    floor = CEILING if arithmetic else FLOOR
    return (*twin, *part, REFERENCE, *TORCH.get(case.name, ()), floor)
