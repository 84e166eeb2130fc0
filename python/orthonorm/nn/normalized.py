"""W / sigma_1(W) for a list of layers: one power iteration for all, and few autograd nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import power_iteration_, spectral_normalization_, spectral_normalization_gradient
from ..ops.normalize import accumulator
from .convolution import ConvOperator
from .store import Store, serves

Empty = Callable[[Sequence[Tensor]], list[Tensor]]
WARM_UP = 15  # power steps from random vectors at registration, as in torch's parametrization

# Weights share an autograd node until they have this many elements. Each node costs Python time in
# forward and backward; one node for all would hold all gradients at once. 1 << 20 is 4 MB of
# float32; with 1 MB, layers of 256x256 took 5 us more each (2026-11).
NODE = 1 << 20


def as_matrix(W: Tensor, dim: int) -> Tensor:
    """Return W as (outputs, everything else); `dim` is the axis of the outputs."""
    return W if dim == 0 and W.dim() == 2 else W.movedim(dim, 0).flatten(1)


def as_weight(A: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return the matrix A in the shape of the weight `like`, contiguous."""
    if dim == 0:
        return A if like.dim() == 2 else A.view(like.shape)
    return A.view(like.movedim(dim, 0).shape).movedim(0, dim).contiguous()


class _Normalize(torch.autograd.Function):
    """Autograd node of W_i / s_i, s_i = u_i^T W_i v_i (1 if that is 0), u and v constant.

    The results `made` are passed in, because one call computes them for more weights than share
    this node. `s` and `vectors` (u_1, v_1, u_2, ...) are those of `spectral_normalization_`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dims: list[int], made: list[Tensor], s: Tensor, vectors: Tensor, *W: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dims = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        s, vectors, *W = ctx.saved_tensors
        out: list[Tensor | None] = list(grads)
        dims, given = ctx.dims, [i for i, G in enumerate(grads) if G is not None]
        G = [as_matrix(g, d) for g, d in zip(grads, dims, strict=True) if g is not None]
        A = [as_matrix(w, d) for w, d in zip(W, dims, strict=True)]
        if len(given) < len(W):
            lengths = [sum(a.shape) for a in A]
            A = [A[i] for i in given]
            pairs = vectors.split(lengths)
            s, vectors = s[given], torch.cat([vectors.new_empty(0), *(pairs[i] for i in given)])
        if torch.is_grad_enabled():
            D = _differentiable(G, A, s, vectors)
        else:
            D = spectral_normalization_gradient.overload(G, A, s, vectors)
        for i, x in zip(given, D, strict=True):
            out[i] = as_weight(x, W[i], dims[i])
        return None, None, None, None, *out


def _differentiable(G: Any, A: Any, s: Tensor, vectors: Tensor) -> list[Tensor]:
    """Compute `spectral_normalization_gradient`, differentiable in G and A; s depends on A."""
    out = []
    x = vectors.split([n for a in A for n in a.shape])
    for g, a, u, v in zip(G, A, x[::2], x[1::2], strict=True):
        D, W = g.to(s.dtype), a.to(s.dtype)
        form = (u * (W @ v)).sum()
        scale = torch.where(form == 0, 1.0, form)
        D = (D - (D * W).sum() / scale * torch.outer(u, v)) / scale
        out.append(D.to(g.dtype))
    return out


class Results:
    """Stack of results: one list of weights per running forward, plus the latest list (`last`).

    `last` is kept only where gradients are enabled. Non-reentrant checkpointing recomputes part of
    a forward in the backward. It must meet the same tensors again and takes them from `last`.
    Reentrant checkpointing builds a graph of its own, which its backward frees; there the weights
    are computed again.
    """

    def __init__(self) -> None:
        self.running: list[Sequence[Tensor | None]] = []
        self.last: Sequence[Tensor | None] | None = None

    def push(self, results: Sequence[Tensor | None]) -> None:
        self.running.append(results)
        self.last = results if torch.is_grad_enabled() else None

    def pop(self) -> None:
        if self.running:
            self.running.pop()

    def __deepcopy__(self, memo: Any) -> Results:
        return Results()  # results belong to the graph of the original


class Place:
    """Position of one layer in lists of `results`; if its entry is None, the layer computes."""

    __slots__ = ("index", "results")

    def __init__(self, results: Results, index: int) -> None:
        self.results, self.index = results, index

    def current(self) -> Tensor | None:
        """Return the weight's ready value, or None if the layer has to compute it."""
        results = self.results
        if results.running:
            return results.running[-1][self.index]
        # saved-tensor hooks during a backward: non-reentrant checkpointing is recomputing
        recorded = _in_backward() and torch._C._autograd._top_saved_tensors_default_hooks(True)
        result = results.last[self.index] if recorded and results.last is not None else None
        return result if result is not None and result.requires_grad else None


def _in_backward() -> bool:
    """Return True during a backward pass; always False while torch.compile traces."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


class SpectralNorm(nn.Module):
    """W / sigma_1(W), sigma_1 by power steps that continue from the buffers `_u` and `_v`.

    `spectral_norm` makes it. In evaluation the vectors stay and sigma = u^T W v. They also stay
    during a backward, where checkpointing computes part of the forward again.

    Shapes: the weight and the result are those of the layer, (outputs, ...). `_u` is (outputs,) and
    `_v` (product of the other sizes,); with an operator, both are feature maps. Cost: as
    `spectral_norm`. Source: arXiv:1802.05957.
    """

    finishes = False  # True in subclasses with a `finish` of their own
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
        self.ready = Place(Results(), 0)
        self.plain = dim == 0 and weight.dim() == 2
        self.count = weight.numel()
        self.kind = _of_vectors if weight.dim() < 2 else _by_operator if operator else _by_matrix
        if weight.dim() < 2:
            return
        A = as_matrix(weight.detach(), dim)
        self.sizes = tuple(A.shape)
        self.length = sum(self.sizes)
        shapes = A.shape if operator is None else (operator.range, operator.domain)
        u, v = (weight.new_empty(n, dtype=accumulator(weight)).normal_() for n in shapes)
        for name, x in (("_u", u), ("_v", v)):
            self.register_buffer(name, x / torch.linalg.vector_norm(x).clamp(min=eps))
        if order == "u_first":
            self.step(weight, WARM_UP)

    def step(self, weight: Tensor, steps: int) -> None:
        """Take power steps: update the vectors and nothing else."""
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
        result = self.ready.current()
        return normalized([self], [weight])[0] if result is None else result

    def finish(self, normal: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the final weight from W / sigma and the vectors; called if `finishes` is True."""
        return normal

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.steps}, dim={self.dim}, order={self.order}"


def normalized(
    layers: Sequence[SpectralNorm], weights: Sequence[Tensor], store: Store | None = None
) -> list[Tensor]:
    """Return each layer's weight divided by its norm; layers of equal settings share one call.

    The results lie in memory of `store` if one is given: for callers that repeat the call.
    """
    recomputing = _in_backward()
    shapes, expected = [w.shape for w in weights], [x.shape for x in layers]
    if shapes != expected:  # one comparison of lists is faster than one per layer
        i = next(i for i, shape in enumerate(shapes) if shape != expected[i])
        raise ValueError(
            f"spectral_norm: the weight must keep shape {tuple(expected[i])}, got "
            f"{tuple(shapes[i])}; remove_spectral_norm first"
        )
    keys: list[Any] = [
        (x.kind, w.device, x.steps if x.training and not recomputing else 0, x.order, x.eps)
        for x, w in zip(layers, weights, strict=True)
    ]
    out = list(weights)
    for key in dict.fromkeys(keys):
        kind, device, *rule = key
        members = [i for i, other in enumerate(keys) if other == key]
        whole = len(members) == len(out)
        some = layers if whole else [layers[i] for i in members]
        W = weights if whole else [weights[i] for i in members]
        empty = store.empty_like if store is not None and serves(device) else _empty
        results = kind(some, W, empty, *rule)
        if whole:
            return results
        for i, result in zip(members, results, strict=True):
            out[i] = result
    return out


def _empty(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Allocate contiguous results of the same shapes and dtypes."""
    return [torch.empty_like(A, memory_format=torch.contiguous_format) for A in matrices]


def _by_matrix(
    layers: Any, W: Any, empty: Empty, steps: int, order: str, eps: float
) -> list[Tensor]:
    """Normalize weights as matrices (outputs, rest), all in one call of the op."""
    buffers = [layer._buffers for layer in layers]  # reading a module's attribute takes 0.5 us
    u, v, dims = [b["_u"] for b in buffers], [b["_v"] for b in buffers], [x.dim for x in layers]
    plain = all(layer.plain for layer in layers)
    with torch.no_grad():
        A = W if plain else [as_matrix(w, d) for w, d in zip(W, dims, strict=True)]
        # the op returns copies of u and v: another forward may change these before our backward
        out = empty(A)
        s, vectors = spectral_normalization_.overload(out, A, u, v, steps, order, eps)
        made = out
        if not plain:
            made = [as_weight(x, w, d) for x, w, d in zip(out, W, dims, strict=True)]
    results: list[Tensor] = []
    start = first = count = 0
    for i, layer in enumerate(layers, 1):
        count += layer.count
        if count >= NODE or i == len(W):
            length = sum([layer.length for layer in layers[first:i]])
            part = vectors.narrow(0, start, length)
            results += _Normalize.apply(dims[first:i], made[first:i], s[first:i], part, *W[first:i])
            start, first, count = start + length, i, 0
    if any(layer.finishes for layer in layers):
        x = vectors.split([n for layer in layers for n in layer.sizes])
        normal = zip(layers, results, x[::2], x[1::2], strict=True)
        results = [layer.finish(*wuv) if layer.finishes else wuv[0] for layer, *wuv in normal]
    return results


def _by_operator(layers: Any, W: Any, _: Empty, steps: int, order: str, eps: float) -> list[Tensor]:
    """Normalize convolutions as maps of feature maps, one after another."""
    results = []
    for layer, w in zip(layers, W, strict=True):
        layer.step(w, steps)
        u, v = layer._u.clone(), layer._v.clone()
        sigma = layer.operator.form(w, u.to(w.dtype), v.to(w.dtype))
        normal = w / torch.where(sigma == 0, 1.0, sigma)
        results.append(layer.finish(normal, u, v) if layer.finishes else normal)
    return results


def _of_vectors(layers: Any, W: Any, _: Empty, steps: int, order: str, eps: float) -> list[Tensor]:
    """Divide 1-D weights by their lengths."""
    return [F.normalize(w, dim=0, eps=eps) for w in W]
