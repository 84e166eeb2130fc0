"""W / sigma_1(W) for a list of layers: one power iteration for all, few divisions and nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import power_iteration_
from ..ops.normalize import accumulator
from .convolution import ConvOperator

WARM_UP = 15  # steps from random vectors, as torch's parametrization takes when it is registered

# Elements of weights that share a node of the graph: one node a layer costs 5 us in the forward,
# one for all keeps all gradients at once and out of the cache (backward 1.5 times torch's, 2026-11)
NODE = 1 << 16


def as_matrix(W: Tensor, dim: int) -> Tensor:
    """(outputs, everything else), `dim` being the outputs' axis."""
    return W if dim == 0 and W.dim() == 2 else W.movedim(dim, 0).flatten(1)


class _Normalize(torch.autograd.Function):
    """W_i / s_i with s_i = u_i^T W_i v_i (1 if that is 0), u and v constant, for a list of weights.

    dL/dW = (G - <G, W> / s u v^T) / s. `vectors` holds u_1, v_1, u_2, ... of lengths `sizes`.
    """

    @staticmethod
    def forward(
        ctx: Any, dims: list[int], sizes: list[int], s: Tensor, vectors: Tensor, *W: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dims, ctx.sizes = dims, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, vectors, *W)
        return tuple(torch._foreach_div(W, s.unbind()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        s, vectors, *W = ctx.saved_tensors
        x = vectors.split(ctx.sizes)
        rows = zip(grads, s.unbind(), x[::2], x[1::2], W, ctx.dims, strict=True)
        return None, None, None, None, *(None if G is None else _gradient(G, *r) for G, *r in rows)


def _gradient(G: Tensor, s: Tensor, u: Tensor, v: Tensor, W: Tensor, dim: int) -> Tensor:
    D, A = as_matrix(G, dim).to(s.dtype), as_matrix(W, dim).to(s.dtype)
    if torch.is_grad_enabled():  # a second derivative sees that s moves with W
        form = (u * (A @ v)).sum()
        s = torch.where(form == 0, 1.0, form)
    c = torch.dot(D.reshape(-1), A.reshape(-1)) / (s * s)
    D = (D / s).addr_(u * -c, v)
    if G.dim() > 2 or dim:
        D = D.view(G.movedim(dim, 0).shape).movedim(0, dim)
    return D.to(G.dtype)


class SpectralNorm(nn.Module):
    """W / sigma_1(W), sigma_1 by power steps that continue from the buffers `_u` and `_v`.

    Made by `spectral_norm`. In evaluation the vectors stay, sigma = u^T W v.
    """

    finishes = False
    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        order: str = "u_first",
        operator: ConvOperator | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.dim, self.eps, self.order = n_power_iterations, dim, eps, order
        self.operator = operator
        self.shape = weight.shape
        self.ready: list[Tensor] = []  # the result, while a forward of a group runs
        self.kind = _of_vectors if weight.dim() < 2 else _by_operator if operator else _by_matrix
        if weight.dim() < 2:
            return
        A = as_matrix(weight.detach(), dim)
        self.sizes = tuple(A.shape)
        shapes = A.shape if operator is None else (operator.range, operator.domain)
        u, v = (weight.new_empty(n, dtype=accumulator(weight)).normal_() for n in shapes)
        for name, x in (("_u", u), ("_v", v)):
            self.register_buffer(name, x / torch.linalg.vector_norm(x).clamp(min=eps))
        if order == "u_first":
            self.step(weight, WARM_UP)

    def step(self, weight: Tensor, steps: int) -> None:
        """Power steps on the vectors alone."""
        if self.kind is _of_vectors:
            return
        weight = weight.detach()
        if self.operator is not None:
            vectors = self._u, self._v
            self.operator.power_iteration(weight, *vectors, steps, self.order, self.eps)
        else:
            A = as_matrix(weight, self.dim)
            power_iteration_([A], [self._u], [self._v], steps, self.order, self.eps)

    def forward(self, weight: Tensor) -> Tensor:
        return self.ready[-1] if self.ready else normalized([self], [weight])[0]

    def finish(self, normal: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """What becomes of W / sigma, given the vectors; called where `finishes` is set."""
        return normal

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.steps}, dim={self.dim}, order={self.order}"


def normalized(layers: Sequence[SpectralNorm], weights: Sequence[Tensor]) -> list[Tensor]:
    """Every layer's weight over its norm: one power iteration and one division for all of them."""
    out = list(weights)
    groups: dict[Any, list[int]] = {}
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        if weight.shape != layer.shape:
            raise ValueError(
                f"spectral_norm: the weight must keep shape {tuple(layer.shape)}, got "
                f"{tuple(weight.shape)}; remove_spectral_norm first"
            )
        steps = layer.steps if layer.training else 0
        key = layer.kind, weight.device, steps, layer.order, layer.eps
        groups.setdefault(key, []).append(i)
    for (kind, _device, *rule), rows in groups.items():
        whole = len(rows) == len(out)
        some = layers if whole else [layers[i] for i in rows]
        W = weights if whole else [weights[i] for i in rows]
        results = kind(some, W, *rule)
        for i, result in zip(rows, results, strict=True):
            out[i] = result
    return out


def _by_matrix(layers: Any, W: Any, steps: int, order: str, eps: float) -> list[Tensor]:
    buffers = [layer._buffers for layer in layers]  # attributes of modules take 0.5 us each
    vectors = [b[name] for b in buffers for name in ("_u", "_v")]
    dims, sizes = [layer.dim for layer in layers], [n for layer in layers for n in layer.sizes]
    with torch.no_grad():
        A = [as_matrix(w, d) for w, d in zip(W, dims, strict=True)]
        sigma = power_iteration_.overload(A, vectors[::2], vectors[1::2], steps, order, eps)
        s = torch.where(sigma == 0, 1.0, sigma)
        # copies: the next forward changes the buffers, perhaps before this one's backward
        used = torch.cat(vectors).to(s.dtype)
    results: list[Tensor] = []
    start = first = count = 0
    for i, w in enumerate(W, 1):
        count += w.numel()
        if count >= NODE or i == len(W):
            length = sum(sizes[2 * first : 2 * i])
            part = used.narrow(0, start, length)
            node = dims[first:i], sizes[2 * first : 2 * i], s[first:i], part, *W[first:i]
            results += _Normalize.apply(*node)
            start, first, count = start + length, i, 0
    if any(layer.finishes for layer in layers):
        x = used.split(sizes)
        rows = zip(layers, results, x[::2], x[1::2], strict=True)
        results = [layer.finish(*row) if layer.finishes else row[0] for layer, *row in rows]
    return results


def _by_operator(layers: Any, W: Any, steps: int, order: str, eps: float) -> list[Tensor]:
    results = []
    for layer, w in zip(layers, W, strict=True):
        layer.step(w, steps)
        u, v = layer._u.clone(), layer._v.clone()
        sigma = layer.operator.form(w, u.to(w.dtype), v.to(w.dtype))
        normal = w / torch.where(sigma == 0, 1.0, sigma)
        results.append(layer.finish(normal, u, v) if layer.finishes else normal)
    return results


def _of_vectors(layers: Any, W: Any, steps: int, order: str, eps: float) -> list[Tensor]:
    return [F.normalize(w, dim=0, eps=eps) for w in W]
