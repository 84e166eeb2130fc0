"""K3, spectral norms: power iteration and Gram iteration, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import autograd, op
from .newton_schulz import divide, frobenius
from .normalize import accumulator
from .words import gram

ORDERS = ("u_first", "v_first")


def _normalized(y: Tensor, old: Tensor, eps: Tensor) -> Tensor:
    """y / max(|y|, eps) over the last dimension; where y is zero, the old vector is kept."""
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    divisor = torch.maximum(norm, eps)
    return torch.where(norm == 0, old, y / torch.where(norm == 0, 1.0, divisor))


def _times(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def _power_steps(
    W: Tensor, u: Tensor, v: Tensor, steps: int, order: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, u, v after `steps` power steps on one batch, on W / |W|_F lest it overflow."""
    peak = frobenius(W)
    A = divide(W, peak, accumulator(W))
    limit = (eps / peak).squeeze(-1).nan_to_num(posinf=0.0).to(A.dtype)
    u, v = u.to(A.dtype), v.to(A.dtype)
    for _ in range(steps):
        if order == "u_first":
            u = _normalized(_times(A, v), u, limit)
            v = _normalized(_times(A.mT, u), v, limit)
        else:
            v = _normalized(_times(A.mT, u), v, limit)
            u = _normalized(_times(A, v), u, limit)
    sigma = (u * _times(A, v)).sum(-1).double() * peak.squeeze(-1).squeeze(-1)
    return sigma.to(A.dtype), u, v


@op(
    "power_iteration_(Tensor[] W, Tensor(a!)[] u, Tensor(b!)[] v, int steps=1, "
    'str order="u_first", float eps=0.0) -> Tensor'
)
def power_iteration_(
    W: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    steps: int = 1,
    order: str = "u_first",
    eps: float = 0.0,
) -> Tensor:
    """u <- W v / |W v|, v <- W^T u / |W^T u| ("u_first"; "v_first": v, then u); sigma = u^T W v.

    Updates the warm buffers of every matrix of the list in place and returns the estimates of
    sigma_1, each a lower bound. "u_first" is the order of torch's spectral_norm parametrization,
    which starts from v; "v_first" that of the legacy hook, which starts from u. eps clamps the
    norms from below (torch: 1e-12); 0 makes the step independent of the scale of W. A vector whose
    product is zero is kept. steps = 0 only evaluates sigma.

    Shapes: W[i] is (..., m, n), u[i] (..., m), v[i] (..., n); sigma is 1-D, one number per matrix
    in list order (batches flattened), float64 if any W is, else float32.
    """
    dtype = accumulator(*W)
    sigmas = []
    for w, u_i, v_i in zip(W, u, v, strict=True):
        sigma, new_u, new_v = _power_steps(w, u_i, v_i, steps, order, eps)
        u_i.copy_(new_u)
        v_i.copy_(new_v)
        sigmas.append(sigma.reshape(-1).to(dtype))
    return torch.cat(sigmas) if sigmas else torch.empty(0, dtype=dtype)


@power_iteration_.check
def _(
    W: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    steps: int = 1,
    order: str = "u_first",
    eps: float = 0.0,
) -> None:
    name = "power_iteration_"
    check.tensors(name, "W", W, min_dim=2)
    check.tensors(name, "u", u, min_dim=1)
    check.tensors(name, "v", v, min_dim=1)
    check.same_lengths(name, W=W, u=u, v=v)
    check.same_device(name, W=W, u=u, v=v)
    for i, (w, u_i, v_i) in enumerate(zip(W, u, v, strict=True)):
        check.equal_shape(name, f"u[{i}]", u_i, w.shape[:-1])
        check.equal_shape(name, f"v[{i}]", v_i, (*w.shape[:-2], w.shape[-1]))
    check.integer(name, "steps", steps, 0)
    check.choice(name, "order", order, ORDERS)
    check.number(name, "eps", eps, 0.0)


def start_vector(W: Tensor) -> Tensor:
    """A fixed, aperiodic unit vector for every matrix of the batch, shape (..., n)."""
    n = W.shape[-1]
    k = torch.arange(1, n + 1, device=W.device, dtype=torch.float64)
    x = torch.frac((k * 12.9898).sin() * 43758.5453) + 0.25  # no sign or period of its own
    x = x / torch.linalg.vector_norm(x)
    return x.to(accumulator(W)).expand(*W.shape[:-2], n).contiguous()


@op(
    "spectral_norm(Tensor W, int steps=32, Tensor? start=None) -> (Tensor, Tensor, Tensor)",
    composite=True,
)
def spectral_norm(
    W: Tensor, steps: int = 32, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma_1(W), u_1, v_1 by power iteration; d sigma / d W = u v^T (the vectors are constants).

    The estimate is a lower bound whose relative error falls as (sigma_2 / sigma_1)^(4 steps).
    `start` warms v (any scale, not zero); None is a fixed vector, so results are reproducible.

    Shapes: W is (..., m, n); sigma (...), u (..., m), v (..., n), float64 if W is, else float32.
    """
    batch, m = W.shape[:-2], W.shape[-2]
    v = start_vector(W) if start is None else start.to(accumulator(W)).clone()
    u = torch.zeros((*batch, m), dtype=v.dtype, device=W.device)
    sigma = power_iteration_([W], [u], [v], steps, "u_first", 0.0)
    return sigma.view(batch), u, v


@spectral_norm.check
def _(W: Tensor, steps: int = 32, start: Tensor | None = None) -> None:
    name = "spectral_norm"
    check.tensor(name, "W", W, min_dim=2)
    check.integer(name, "steps", steps, 1)
    if start is not None:
        check.tensor(name, "start", start)
        check.equal_shape(name, "start", start, (*W.shape[:-2], W.shape[-1]))
        check.same_device(name, W=[W], start=[start])


@op("gram_iteration(Tensor W, int steps=5) -> Tensor", composite=True)
def gram_iteration(W: Tensor, steps: int = 5) -> Tensor:
    """(sum_i sigma_i^(2^(k+1)))^(2^-(k+1)) >= sigma_1 after k steps of M <- M^T M: an upper bound.

    The Schatten norm of order 2^(k+1) by repeated, rescaled Gram products on the short side
    (arXiv:2305.16173). It is raised by the products' rounding, so it bounds the exact sigma_1 from
    above. Gradient: P (P^T P)^(2^k - 1) with P = W / bound.

    Shapes: W is (..., m, n), the bound (...), float64 if W is, else float32.
    """
    size = frobenius(W)
    M = divide(W, size, accumulator(W))
    M = M.mT if W.shape[-2] > W.shape[-1] else M
    log_bound = size.log()
    for k in range(1, steps + 1):
        M = gram(M)
        size = frobenius(M)
        M = divide(M, size, M.dtype)
        log_bound = log_bound + size.log() / 2**k
    slack = 1 + 2 * max(W.shape[-2:]) * torch.finfo(M.dtype).eps
    return (log_bound.exp() * slack).squeeze(-1).squeeze(-1).to(M.dtype)


@gram_iteration.check
def _(W: Tensor, steps: int = 5) -> None:
    check.tensor("gram_iteration", "W", W, min_dim=2)
    check.integer("gram_iteration", "steps", steps, 0)


def _spectral_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, u, v = output
    ctx.mark_non_differentiable(u, v)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(u, v)


def _spectral_norm_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    u, v = ctx.saved_tensors
    return (grad[..., None, None] * (u.unsqueeze(-1) * v.unsqueeze(-2))).to(ctx.dtype), None, None


def _gram_iteration_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.steps = inputs[1]
    ctx.save_for_backward(inputs[0], output)


def _gram_iteration_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    W, bound = ctx.saved_tensors
    P = divide(W, bound[..., None, None].double(), bound.dtype)
    wide = W.shape[-2] <= W.shape[-1]
    P = P if wide else P.mT
    power = gram(P)
    for k in range(ctx.steps):  # P (P^T P)^(2^k - 1) = (A^(2^(k-1)) ... A^2 A) P with A = P P^T
        P = power @ P
        power = power @ power if k + 1 < ctx.steps else power
    P = P if wide else P.mT
    return (grad[..., None, None] * P).to(W.dtype), None


autograd(spectral_norm, _spectral_norm_backward, _spectral_norm_setup)
autograd(gram_iteration, _gram_iteration_backward, _gram_iteration_setup)
