"""K3 in layers: W / sigma_1(W) of a list of weights, by power steps from kept vectors; gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .normalize import accumulator
from .spectral import check_power_iteration, power_iteration_


def _members(W: list[Tensor]) -> list[int]:
    """Return the number of matrices in each tensor of the list."""
    return [w.shape[:-2].numel() for w in W]


def _divisors(W: list[Tensor], sigma: Tensor) -> list[Tensor]:
    """Return sigma of every tensor's matrices as (..., 1, 1), with 1 for 0."""
    s = torch.where(sigma == 0, 1.0, sigma)
    parts = s.split(_members(W)) if W else []
    return [x.view(*w.shape[:-2], 1, 1).to(accumulator(w)) for w, x in zip(W, parts, strict=True)]


@op(
    "spectral_normalization_(Tensor(a!)[] out, Tensor[] W, Tensor(b!)[] u, Tensor(c!)[] v, "
    'int steps=1, str order="u_first", float eps=0.0) -> (Tensor, Tensor)',
    composite=True,
)
def spectral_normalization_(
    out: list[Tensor],
    W: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    steps: int = 1,
    order: str = "u_first",
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out_i <- W_i / sigma_i, sigma_i and the vectors after `power_iteration_` on W, u and v.

    A kernel divides a matrix while it is still in the cache: it reads W from memory once, and
    writes out once. Where sigma is 0, out is W. The op is not differentiable; its gradient is
    `spectral_normalization_gradient`.

    Arguments, and updates of u and v, are those of `power_iteration_`. Shapes: out[i] has shape and
    dtype of W[i].

    Returns: sigma, as `power_iteration_`, and copies of the new u_1, v_1, u_2, ... of all matrices
    in one 1-D tensor of sigma's dtype, for the gradient.
    """
    sigma = power_iteration_.overload(W, u, v, steps, order, eps)
    for y, w, s in zip(out, W, _divisors(W, sigma), strict=True):
        y.copy_(w / s)
    pairs = [torch.cat([x, y], -1).reshape(-1) for x, y in zip(u, v, strict=True)]
    vectors = torch.cat(pairs).to(sigma.dtype) if pairs else torch.empty_like(sigma)
    return sigma, vectors


@spectral_normalization_.check
def _(
    out: list[Tensor],
    W: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    steps: int = 1,
    order: str = "u_first",
    eps: float = 0.0,
) -> None:
    name = "spectral_normalization_"
    check.tensors(name, "out", out, min_dim=2)
    check_power_iteration(name, W, u, v, steps, order, eps)
    check.same_shapes(name, W=W, out=out)
    for i, (y, w) in enumerate(zip(out, W, strict=True)):
        if y.dtype != w.dtype:
            raise TypeError(f"{name}: out[{i}] must have the dtype {w.dtype} of W, got {y.dtype}")


@op(
    "spectral_normalization_gradient(Tensor[] grads, Tensor[] W, Tensor sigma, Tensor vectors) "
    "-> Tensor[]",
    composite=True,
)
def spectral_normalization_gradient(
    grads: list[Tensor], W: list[Tensor], sigma: Tensor, vectors: Tensor
) -> list[Tensor]:
    """(G - <G, W> / sigma u v^T) / sigma: of W / (u^T W v), u and v constant, G its gradient.

    Where sigma is 0 it counts as 1, as in the quotient.

    Shapes: grads[i] and W[i] are (..., m, n); sigma and vectors are those that
    `spectral_normalization_` returns. The results are contiguous, with shapes and dtypes of grads.
    """
    results, start = [], 0
    for G, w, s in zip(grads, W, _divisors(W, sigma), strict=True):
        dtype = accumulator(G, w)
        (m, n), batch = w.shape[-2:], w.shape[:-2]
        length = batch.numel() * (m + n)
        pairs = vectors[start : start + length].view(*batch, m + n).to(dtype)
        u, v = pairs[..., :m].unsqueeze(-1), pairs[..., m:].unsqueeze(-2)
        D, s = G.to(dtype), s.to(dtype)
        inner = (D.double() * (w.double() / s)).sum((-2, -1), keepdim=True)
        D = D / s - (inner / s).to(dtype) * u * v
        results.append(D.to(G.dtype, memory_format=torch.contiguous_format))
        start += length
    return results


@spectral_normalization_gradient.check
def _(grads: list[Tensor], W: list[Tensor], sigma: Tensor, vectors: Tensor) -> None:
    name = "spectral_normalization_gradient"
    check.tensors(name, "grads", grads, min_dim=2)
    check.tensors(name, "W", W, min_dim=2)
    check.same_shapes(name, W=W, grads=grads)
    check.tensor(name, "sigma", sigma)
    check.tensor(name, "vectors", vectors)
    check.same_device(name, grads=grads, W=W, sigma=[sigma], vectors=[vectors])
    matrices = sum(_members(W))
    check.equal_shape(name, "sigma", sigma, (matrices,))
    sides = [w.shape[:-2].numel() * sum(w.shape[-2:]) for w in W]
    check.equal_shape(name, "vectors", vectors, (sum(sides),))
