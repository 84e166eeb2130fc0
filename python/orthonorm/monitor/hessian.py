"""The Hessian of a loss through its products with vectors: eigenvalues, diagonal, alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check

Vectors = list[Tensor]


class Eigen(NamedTuple):
    """Eigenvalues (k,), largest magnitude first, eigenvectors (lists like params) and residuals."""

    values: Tensor
    vectors: list[Vectors]
    residuals: Tensor


def hessian_product(
    loss: Tensor, params: Iterable[Tensor], create_graph: bool = False
) -> Callable[[Sequence[Tensor]], Vectors]:
    """v -> H v with H = d^2 loss / d params^2, by differentiating <d loss / d params, v>.

    Args:
        loss: a scalar whose graph reaches `params`; the graph is kept for further products.
        params: leaves that require gradients; those that the loss does not depend on get zeros.
        create_graph: True makes the products differentiable themselves.

    Returns: a function from a list of tensors, of the shapes of params, to such a list. Cost per
    call: about two backward passes. Source: B. Pearlmutter, Fast Exact Multiplication by the
    Hessian (1994).
    """
    params = _params("hessian_product", loss, params)
    gradients = torch.autograd.grad(
        loss, params, create_graph=True, allow_unused=True, materialize_grads=True
    )

    def product(v: Sequence[Tensor]) -> Vectors:
        check.same_shapes("hessian_product", params=params, v=list(v))
        inner = sum(((g * x).sum() for g, x in zip(gradients, v, strict=True)), loss.new_zeros(()))
        if not inner.requires_grad:  # the loss is linear in all params, so H = 0
            return [torch.zeros_like(p) for p in params]
        return list(torch.autograd.grad(
            inner, params, retain_graph=True, create_graph=create_graph, allow_unused=True,
            materialize_grads=True,
        ))  # fmt: skip

    return product


def top_hessian_eigenvalues(
    loss: Tensor,
    params: Iterable[Tensor],
    k: int = 1,
    *,
    steps: int = 100,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Eigen:
    """lambda_1..k of H, largest |lambda| first: v <- H v / |H v|, lambda = v^T H v, deflated.

    Each vector found is projected out of the next ones: H is symmetric, so its eigenvectors are
    orthogonal. Iteration stops when |H v - lambda v| <= tol |lambda|. It needs a gap between
    magnitudes; where |lambda_i| = |lambda_j| with opposite signs, the residual stays large.

    Args:
        loss, params: as in `hessian_product`.
        k: eigenvalues wanted, at most the number of parameters.
        steps: most power steps per eigenvalue.
        tol: relative tolerance of the residual.
        generator: draws the starts; None takes a fixed seed.

    Returns: values (k,), vectors (k lists like params, each of unit length over all of them) and
    residuals |H v - lambda v| (k,). Cost: up to k steps products, each two backward passes.
    Source: "Empirical Analysis of the Hessian of Over-Parametrized Neural Networks".
    """
    name = "top_hessian_eigenvalues"
    params = _params(name, loss, params)
    check.integer(name, "k", k, 1)
    check.integer(name, "steps", steps, 1)
    check.number(name, "tol", tol, 0.0)
    count = sum(p.numel() for p in params)
    if k > count:
        raise ValueError(f"{name}: k must be at most the number of parameters, {count}, got {k}")
    product = hessian_product(loss, params)
    generator = generator or torch.Generator().manual_seed(0)
    found: list[Vectors] = []
    values, residuals = [], []
    for _ in range(k):
        v = [torch.randn(p.shape, generator=generator).to(p) for p in params]
        value, v, residual = _power(product, v, found, steps, tol)
        found.append(v)
        values.append(value)
        residuals.append(residual)
    return Eigen(torch.stack(values), found, torch.stack(residuals))


def _power(
    product: Callable[[Sequence[Tensor]], Vectors],
    v: Vectors,
    found: list[Vectors],
    steps: int,
    tol: float,
) -> tuple[Tensor, Vectors, Tensor]:
    """Find an eigenvector orthogonal to those found; return (lambda, v, |H v - lambda v|)."""
    v = _unit(_without(v, found))
    for left in reversed(range(steps)):
        w = _without(product(v), found)
        value = _inner(v, w)
        difference = torch._foreach_sub(w, torch._foreach_mul(v, value))
        residual = _inner(difference, difference).sqrt()
        size = _inner(w, w).sqrt()
        done = residual <= tol * value.abs() or size == 0 or not size.isfinite()
        if done or left == 0:  # value and residual belong to this v, not to a next one
            break
        v = _unit(_without(torch._foreach_div(w, size), found))
    return value, v, residual


def _without(v: Sequence[Tensor], found: list[Vectors]) -> Vectors:
    """Return v minus its components along the vectors found.

    Once is enough, because every power step does it again.
    """
    out = list(v)
    for u in found:
        out = list(torch._foreach_sub(out, torch._foreach_mul(u, _inner(u, out))))
    return out


def _inner(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Return the inner product over all tensors of two lists."""
    return torch.stack([(a * b).sum() for a, b in zip(u, v, strict=True)]).sum().detach()


def _unit(v: Vectors) -> Vectors:
    """Return v / |v|, |v| over all tensors of the list; zero stays zero."""
    size = _inner(v, v).sqrt()
    return list(torch._foreach_div(v, torch.where(size == 0, torch.ones_like(size), size)))


def hessian_diagonal(
    loss: Tensor,
    params: Iterable[Tensor],
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Vectors:
    """diag(H) = E[z * (H z)], a mean over Rademacher vectors z (Hutchinson): exact for diagonal H.

    Args:
        loss, params: as in `hessian_product`.
        samples: number of vectors z; the error falls as 1 / sqrt(samples).
        generator: draws z; None takes a fixed seed.

    Returns: a list of the shapes of params. Cost: two backward passes per sample. Source:
    arXiv:2308.11778, which draws 1000.
    """
    name = "hessian_diagonal"
    params = _params(name, loss, params)
    check.integer(name, "samples", samples, 1)
    product = hessian_product(loss, params)
    generator = generator or torch.Generator().manual_seed(0)
    total = [torch.zeros_like(p) for p in params]
    for _ in range(samples):
        z = [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in params]
        for t, zi, hz in zip(total, z, product(z), strict=True):
            t += zi * hz / samples
    return total


def hessian_gradient_product(
    loss: Tensor, params: Iterable[Tensor], create_graph: bool = False
) -> tuple[Vectors, Vectors]:
    """(g, H g) with g = d loss / d params and H g = |g| d|g| / d params.

    Args:
        loss, params: as in `hessian_product`.
        create_graph: True makes both differentiable, so that they can be penalized.

    Returns: two lists like params. Cost: three backward passes. Source: arXiv:2308.11778.
    """
    params = _params("hessian_gradient_product", loss, params)
    g = torch.autograd.grad(
        loss, params, create_graph=True, allow_unused=True, materialize_grads=True
    )
    half = sum((x.square().sum() for x in g), loss.new_zeros(())) / 2  # d(|g|^2 / 2) = |g| d|g|
    hg = torch.autograd.grad(
        half, params, create_graph=create_graph, retain_graph=True, allow_unused=True,
        materialize_grads=True,
    ) if half.requires_grad else tuple(torch.zeros_like(p) for p in params)  # fmt: skip
    return [x if create_graph else x.detach() for x in g], list(hg)


def hessian_alignment(
    losses: Sequence[Tensor],
    params: Iterable[Tensor],
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """mean_e (alpha |H_e g_e - mean H g|^2 + beta |g_e - mean g|^2) over environments e.

    Zero if gradients, and Hessians along the gradients, agree between environments.
    Differentiable: add it to the loss of a classifier's head for domain generalization.

    Args:
        losses: one scalar per environment, two or more.
        params: parameters of the head, shared by all environments.
        alpha, beta: weights of the two terms.

    Returns: a scalar (shape ()). Cost: four backward passes per environment.

    Source: arXiv:2308.11778.
    """
    name = "hessian_alignment"
    if not isinstance(losses, (list, tuple)) or len(losses) < 2:
        raise ValueError(f"{name}: losses must be a list of two or more scalars, got {losses!r}")
    check.number(name, "alpha", alpha, 0.0)
    check.number(name, "beta", beta, 0.0)
    params = list(params)
    pairs = [hessian_gradient_product(loss, params, create_graph=True) for loss in losses]
    total = losses[0].new_zeros(())
    for weight, which in ((beta, 0), (alpha, 1)):
        stacked = torch.stack([torch.cat([x.flatten() for x in pair[which]]) for pair in pairs])
        total = total + weight * (stacked - stacked.mean(0)).square().sum(1).mean()
    return total


def _params(name: str, loss: Tensor, params: Iterable[Tensor]) -> Vectors:
    """Check loss and params of the function `name`; return params as a list."""
    listed = list(params)
    check.tensor(name, "loss", loss)
    check.tensors(name, "params", listed)
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"{name}: loss must be a scalar with a graph, got {loss!r}")
    if not listed or not all(p.requires_grad for p in listed):
        raise ValueError(f"{name}: params must be one or more tensors that require gradients")
    return listed
