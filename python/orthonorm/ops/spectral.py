"""K3, spectral norms: power iteration and Gram iteration, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import autograd, op
from .normalize import accumulator
from .scaling import divide, frobenius
from .words import apply, gram

ORDERS = ("u_first", "v_first")


class _Vector:
    """A vector of the power iteration: its direction, and a flag that a step has replaced it."""

    def __init__(self, buffer: Tensor, dtype: torch.dtype) -> None:
        self.buffer, self.x = buffer, buffer.to(dtype)
        self.new = torch.zeros((*buffer.shape[:-1], 1), dtype=torch.bool, device=buffer.device)

    def step(self, y: Tensor, eps: Tensor) -> None:
        """x <- y / max(|y|, eps); x stays the same where y is zero."""
        norm = frobenius(y.unsqueeze(-1)).squeeze(-1)
        replaced = norm != 0
        divisor = torch.where(replaced, torch.maximum(norm, eps), 1.0)
        self.x = torch.where(replaced, (y / divisor).to(y.dtype), self.x)
        self.new = self.new | replaced

    def write(self, valid: Tensor) -> None:
        """Write x to the buffer where a step replaced it and the result is valid."""
        self.buffer.copy_(torch.where(self.new & valid, self.x.to(self.buffer.dtype), self.buffer))


def _times(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def _power_steps(W: Tensor, u: Tensor, v: Tensor, steps: int, order: str, eps: float) -> Tensor:
    """Take power steps on one batch of W / |W|_F, which cannot overflow; return sigma of W."""
    size = frobenius(W)
    A = divide(W, size, accumulator(W))
    limit = (eps / size).squeeze(-1).nan_to_num(posinf=0.0)
    left, right = _Vector(u, A.dtype), _Vector(v, A.dtype)
    for _ in range(steps):
        if order == "u_first":
            left.step(_times(A, right.x), limit)
            right.step(_times(A.mT, left.x), limit)
        else:
            right.step(_times(A.mT, left.x), limit)
            left.step(_times(A, right.x), limit)
    sigma = (left.x.double() * _times(A, right.x)).sum(-1, keepdim=True)
    valid = sigma.isfinite()
    left.write(valid)
    right.write(valid)
    sigma = torch.where(valid, sigma, torch.nan) * size.squeeze(-1)
    return sigma.squeeze(-1).to(A.dtype)


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

    It updates u and v of every matrix of the list in place, and returns the estimates of sigma_1,
    each a lower bound. "u_first" is the order of torch's spectral_norm parametrization, which
    starts from v; "v_first" is that of the legacy hook, which starts from u. eps clamps the norms
    from below (torch: 1e-12); 0 makes the step independent of the scale of W. If the product for a
    vector is zero, the vector stays the same. steps = 0 only evaluates sigma. Where W or its
    vectors are not finite, sigma is NaN and both vectors stay as they were.

    Products are in float32 or better, norms and sigma in float64. It is not differentiable;
    `spectral_norm` is.

    Shapes: W[i] is (..., m, n), u[i] (..., m), v[i] (..., n); sigma is 1-D, one number per matrix
    in list order (batches flattened), float64 if any W is, else float32.
    """
    dtype = accumulator(*W)
    sigmas = []
    for w, u_i, v_i in zip(W, u, v, strict=True):
        sigmas.append(_power_steps(w, u_i, v_i, steps, order, eps).reshape(-1).to(dtype))
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
    check_power_iteration("power_iteration_", W, u, v, steps, order, eps)


def check_power_iteration(
    name: str,
    W: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    steps: int,
    order: str,
    eps: float,
) -> None:
    """Check the arguments of ops that take power steps."""
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
    """Return a fixed, aperiodic unit vector for every matrix of the batch, shape (..., n)."""
    n = W.shape[-1]
    k = torch.arange(1, n + 1, device=W.device, dtype=torch.float64)
    x = torch.frac((k * 12.9898).sin() * 43758.5453) + 0.25  # in (-0.75, 1.25)
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

    The estimate is a lower bound whose relative error falls as (sigma_2 / sigma_1)^(4 steps). The
    gradient is as precise as the vectors. `start` is the first v (any scale, not zero); None is a
    fixed vector, so results are reproducible. A zero matrix has sigma 0, u = 0 and gradient 0. A
    matrix that is not finite has sigma, u and v NaN. Second derivatives raise NotImplementedError.

    Shapes: W is (..., m, n); sigma (...), u (..., m), v (..., n), float64 if W is, else float32.
    """
    batch, m = W.shape[:-2], W.shape[-2]
    v = start_vector(W) if start is None else start.to(accumulator(W), copy=True).contiguous()
    u = torch.zeros((*batch, m), dtype=v.dtype, device=W.device)
    sigma = power_iteration_([W], [u], [v], steps, "u_first", 0.0).view(batch)
    invalid = sigma.isnan().unsqueeze(-1)
    u, v = (torch.where(invalid, torch.nan, x) for x in (u, v))
    return sigma, u, v


@spectral_norm.check
def _(W: Tensor, steps: int = 32, start: Tensor | None = None) -> None:
    check_top_triple("spectral_norm", W, steps, start)


def check_top_triple(name: str, W: Tensor, steps: int, start: Tensor | None) -> None:
    """Check the arguments of the function `name`, which takes a top singular triple."""
    check.tensor(name, "W", W, min_dim=2)
    check.integer(name, "steps", steps, 1)
    if start is not None:
        check.tensor(name, "start", start)
        check.equal_shape(name, "start", start, (*W.shape[:-2], W.shape[-1]))
        check.same_device(name, W=[W], start=[start])


@op("gram_iteration(Tensor W, int steps=5) -> Tensor", composite=True)
def gram_iteration(W: Tensor, steps: int = 5) -> Tensor:
    """(sum_i sigma_i^(2^(k+1)))^(2^-(k+1)) >= sigma_1 after k steps of M <- M^T M: an upper bound.

    It is the Schatten norm of order 2^(k+1), by repeated, rescaled Gram products on the short side
    (arXiv:2305.16173). To stay above the exact sigma_1 it is multiplied by 1 + 2 max(m, n) eps, for
    the rounding of the products, and rounded upwards. It is 0 for a zero matrix, and NaN where W is
    not finite.

    Gradient: P (P^T P)^(2^k - 1) with P = W / bound; zero for a zero matrix. Second derivatives
    raise NotImplementedError.

    Shapes: W is (..., m, n), the bound (...), float64 if W is, else float32.
    """
    size = frobenius(W)
    M = divide(W, size, accumulator(W))
    M = M.mT if W.shape[-2] > W.shape[-1] else M
    sizes = []
    for _ in range(steps):
        M = gram(M)
        sizes.append(frobenius(M))
        M = divide(M, sizes[-1], M.dtype)
    bound = size * _nested_root(sizes, size) * _slack(W)
    return _round_up(bound.squeeze(-1).squeeze(-1), M.dtype)


def _slack(W: Tensor) -> float:
    return 1 + 2 * max(W.shape[-2:]) * torch.finfo(accumulator(W)).eps


def _nested_root(sizes: list[Tensor], like: Tensor) -> Tensor:
    """Return (s_1 (s_2 (s_3 ...)^(1/2))^(1/2))^(1/2), without powers that could overflow."""
    root = torch.ones_like(like)
    for size in reversed(sizes):
        root = (size * root).sqrt()
    return root


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a number of `dtype` not below x; for denormal x, not below x before its rounding."""
    near = x.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    denormal = (x > 0) & (x < torch.finfo(x.dtype).smallest_normal)
    return torch.where((near.double() < x) | denormal, above, near)


@gram_iteration.check
def _(W: Tensor, steps: int = 5) -> None:
    check.tensor("gram_iteration", "W", W, min_dim=2)
    check.integer("gram_iteration", "steps", steps, 0)


class _FirstOnly(torch.autograd.Function):
    """Autograd node that passes a gradient on, and raises if it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, W: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: second derivatives are not implemented; for them, differentiate "
            "torch.linalg.matrix_norm(W, 2)"
        )


def _first_only(gradient: Tensor, W: Tensor, name: str) -> Tensor:
    """Guard a gradient by `_FirstOnly` if its backward builds a graph (create_graph=True)."""
    if not torch.is_grad_enabled():
        return gradient
    guarded: Tensor = _FirstOnly.apply(gradient, W, name)
    return guarded


def _spectral_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, u, v = output
    ctx.mark_non_differentiable(u, v)
    ctx.save_for_backward(inputs[0], u, v)


def _spectral_norm_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    W, u, v = ctx.saved_tensors
    gradient = (grad[..., None, None] * (u.unsqueeze(-1) * v.unsqueeze(-2))).to(W.dtype)
    return _first_only(gradient, W, "spectral_norm"), None, None


def _gram_iteration_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.steps = inputs[1]
    ctx.save_for_backward(inputs[0])


def _gram_iteration_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (W,) = ctx.saved_tensors
    with torch.no_grad():
        direction = _bound_direction(W, ctx.steps)
    gradient = (grad[..., None, None] * direction).to(W.dtype)
    return _first_only(gradient, W, "gram_iteration"), None


def _bound_direction(W: Tensor, steps: int) -> Tensor:
    """Return d bound / d W, a multiple of A^(2^(k-1)) ... A^2 A W with A = W W^T and k = steps.

    The bound is homogeneous of degree one, so its gradient's inner product with W is the bound
    itself. That determines the multiple, whatever the powers were scaled by.
    """
    X = divide(W, frobenius(W), accumulator(W))
    X = X.mT if W.shape[-2] > W.shape[-1] else X
    Y, power, sizes = X, X, []
    for _ in range(steps):
        power = gram(power)  # X X^T at first, then squares of the symmetric `power`
        sizes.append(frobenius(power))
        power = divide(power, sizes[-1], X.dtype)
        Y = apply(Y, power, 0.0)
        Y = divide(Y, frobenius(Y), X.dtype)
    inner = (Y.double() * X.double()).sum((-2, -1), keepdim=True)
    Y = divide(Y.double() * (_nested_root(sizes, inner) * _slack(W)), inner, X.dtype)
    return Y.mT if W.shape[-2] > W.shape[-1] else Y


autograd(spectral_norm, _spectral_norm_backward, _spectral_norm_setup)
autograd(gram_iteration, _gram_iteration_backward, _gram_iteration_setup)
