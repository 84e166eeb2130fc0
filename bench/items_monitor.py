"""Rows of orthonorm.monitor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from orthonorm import monitor
from torch import Tensor, nn

from .inputs import Arguments, Inputs
from .items import Item, matrices
from .shapes import Shape

svdvals = torch.linalg.svdvals


def entropy(p: Tensor) -> Tensor:
    """Return exp of the entropy of p / sum p."""
    p = p / p.sum()
    return torch.exp(-(p * p.log()).sum())


def shifted(X: Tensor, eps: float = 1e-7) -> Tensor:
    p = svdvals(X) / svdvals(X).sum() + eps
    return torch.exp(-(p * p.log()).sum())


def exponent(X: Tensor) -> Tensor:
    """Return minus the slope of log lambda over log k, by least squares with weights 1 / k."""
    y = svdvals(X).log() * 2
    k = torch.arange(1, len(y) + 1, dtype=y.dtype)
    A = torch.stack([k.log(), torch.ones_like(k)], 1) / k.sqrt()[:, None]
    return -torch.linalg.lstsq(A, (y / k.sqrt())[:, None], driver="gelsd").solution[0, 0]


def hill(X: Tensor, rows: int, ratio: float, windows: int) -> Tensor:
    """Return the Hill estimate from the upper half of the pooled lambda."""
    wide = int(rows * ratio)
    at = [[(n - w) * i // (windows - 1) for i in range(windows)]
          for n, w in zip(X.shape, (rows, wide), strict=True)]  # fmt: skip
    parts = [svdvals(X[i : i + rows, j : j + wide]) ** 2 for i, j in itertools.product(*at)]
    tail = torch.cat(parts).sort().values
    tail = tail[len(tail) // 2 :]
    return 1 + len(tail) / (tail / tail[0]).log().sum()


def columns(X: Tensor) -> Tensor:
    Z = X - X.mean(0)
    lengths = (Z / Z.square().sum(1, keepdim=True).sqrt()).square().sum(0).sqrt()
    return lengths.sort(descending=True).values[: min(X.shape)].sum()


# ---- alignment, alarms, caches -------------------------------------------------------------------
def layer(shape: Shape, inputs: Inputs) -> Arguments:
    return {"W": inputs.matrix("W", shape), "X": inputs.put(inputs.normal("X", (40, shape[1])))}


def cosines(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return |mean of the cosines| and twice the smaller share of a sign.

    Neither depends on the sign of v_1.
    """
    v = torch.linalg.svd(W).Vh[0]
    s = torch.nn.functional.cosine_similarity(X, v[None])
    share = (s > 0).to(W.dtype).mean()
    return s.mean().abs(), 2 * torch.minimum(share, 1 - share)


def aligned(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    result = monitor.spectral_alignment(W, X)
    return result.mean, result.diversity


def series(*_: Any) -> Arguments:
    g = torch.Generator().manual_seed(0)
    return {"values": torch.rand(300, generator=g, dtype=torch.float64).square().tolist()}


def told(make: Callable[..., Any], **rule: Any) -> Callable[..., list[float]]:
    """Return the function that feeds values to an alarm; 1 where it is raised, else 0."""

    def call(values: Sequence[float]) -> list[float]:
        alarm = make(**rule)
        return [float(alarm("layer", x)) for x in values]

    return call


def collapses(values: Sequence[float]) -> list[float]:
    """Return 1 at the second of two values in a row <= 0.1, once after each value >= 0.3."""
    out, armed = [0.0] * len(values), False
    for i, x in enumerate(values):
        armed = armed or x >= 0.3
        if armed and i and max(values[i - 1 : i + 1]) <= 0.1:
            out[i], armed = 1.0, False
    return out


def growths(values: Sequence[float]) -> list[float]:
    """Return 1 at the second of two values in a row above 4 times the least median of three.

    The search starts anew after each.
    """
    out, start = [0.0] * len(values), 0
    for i in range(len(values)):
        grown = []
        for j in (i - 1, i):
            medians = [sorted(values[k - 3 : k])[1] for k in range(start + 3, j + 1)]
            grown.append(j >= start and bool(medians) and values[j] > 4 * min(medians))
        if all(grown):
            out[i], start = 1.0, i + 1
    return out


def caches(shape: Shape, inputs: Inputs) -> Arguments:
    return {"X": inputs.put(inputs.normal("X", (2, 3, *shape)))}


def best_bits(norms: Tensor, mean_bits: float, low: int, high: int) -> Tensor:
    """Return the least error of all allocations."""
    every = torch.cartesian_prod(*[torch.arange(low, high + 1)] * norms.numel())
    every = every[every.sum(1) <= mean_bits * norms.numel()]
    return (norms.flatten() ** 2 * 4.0**-every).sum(1).min()


def error_of_bits(norms: Tensor, **rule: Any) -> Tensor:
    return (norms**2 * 4.0 ** -monitor.kv_bits(norms, **rule)).sum()


def widths(shape: Shape, inputs: Inputs) -> Arguments:
    return {"weights": [inputs.matrix(f"W{d}", (d, 2 * d)) * d**0.75 for d in (8, 16, 32)]}


def matched(weights: list[Tensor]) -> list[float]:
    found = monitor.match_widths({len(W): {"layer": W} for W in weights})["layer"]
    return [*found.sigma.values(), found.spread, found.exponent]


def matching(weights: list[Tensor]) -> list[Tensor]:
    s = torch.stack([svdvals(W)[0] for W in weights])
    x = torch.tensor([[math.log(len(W)), 1.0] for W in weights], dtype=s.dtype)
    slope = torch.linalg.lstsq(x, s.log()[:, None], driver="gelsd").solution[0, 0]
    return [*s, s.max() / s.min(), slope]


# ---- Hessians ------------------------------------------------------------------------------------
def problem(shape: Shape, inputs: Inputs) -> Arguments:
    n = min(*shape, 6)
    shapes = {"A": (2 * n, n), "w": (n,), "v": (n,)}
    return {tag: inputs.put(inputs.normal(tag, sides)) for tag, sides in shapes.items()}


def loss(A: Tensor, w: Tensor) -> Tensor:
    return (torch.tanh(A @ w)).square().sum() + (w**4).sum()


def hessian(A: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient and the dense Hessian."""
    f = lambda x: loss(A, x)  # noqa: E731
    return torch.autograd.functional.jacobian(f, w), torch.autograd.functional.hessian(f, w)


def leaf(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of (A, w, v) that makes w a leaf and calls with the loss and [w]."""

    def with_loss(A: Tensor, w: Tensor, v: Tensor) -> Any:
        w = w if w.requires_grad else w.detach().requires_grad_()
        return call(loss(A, w), [w], v)

    return with_loss


def top(A: Tensor, w: Tensor, v: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(hessian(A, w)[1])
    return values[values.abs().argsort(descending=True)][:2]


def probes(A: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Return the mean of z * H z over the draws that `hessian_diagonal` makes."""
    g, H = torch.Generator().manual_seed(0), hessian(A, w)[1]
    z = [(torch.randint(2, w.shape, generator=g) * 2 - 1).to(w) for _ in range(5)]
    return sum(x * (H @ x) for x in z) / 5


def environments(A: Tensor, w: Tensor, v: Tensor) -> Tensor:
    w = w if w.requires_grad else w.detach().requires_grad_()
    return monitor.hessian_alignment([loss(A, w), loss(A.flip(0) ** 2, w)], [w], 0.5, 2.0)


def disagreement(A: Tensor, w: Tensor, v: Tensor) -> Tensor:
    pairs = [hessian(a, w) for a in (A, A.flip(0) ** 2)]
    gap = lambda a, b: ((a - b) / 2).square().sum()  # noqa: E731
    products = [H @ g for g, H in pairs]
    return 0.5 * gap(*products) + 2.0 * gap(pairs[0][0], pairs[1][0])


# ---- iterations ----------------------------------------------------------------------------------
def covariance(shape: Shape, inputs: Inputs) -> Arguments:
    A = inputs.matrix("A", shape)
    return {"V": A @ A.mT, "B": torch.linalg.qr(inputs.put(inputs.normal("B", (shape[0], 3))))[0]}


def within(V: Tensor, B: Tensor) -> Tensor:
    return monitor.projected_power_iteration(V, lambda x: B @ (B.mT @ x), V[:, 0], 2000).value


def streamed(X: Tensor) -> Tensor:
    stream = monitor.StreamingEigenvector(X.shape[1], dtype=X.dtype)
    stream.vector = torch.ones_like(X[0]) / X.shape[1] ** 0.5
    for block in X.split(2):
        stream.update(block)
    return stream.vector


def oja(X: Tensor) -> Tensor:
    """Multiply by I + eta A^T A per block and normalize once at the end, as steps are linear."""
    v, total = torch.ones_like(X[0]), 0.0
    for block in X.split(2):
        total = total + (block**2).sum()
        v = (torch.eye(len(v)).to(v) + block.mT @ block / total) @ v
    return v / v.norm()


def terms(shape: Shape, inputs: Inputs) -> Arguments:
    L = min(*shape, 5)
    a = torch.linalg.qr(inputs.put(inputs.normal("a", (L, 3))))[0]
    return {"values": torch.tensor([3.0, 2.0, 1.0]).to(a), "a": a}


def found_terms(values: Tensor, a: Tensor) -> list[Tensor]:
    T = torch.einsum("r,ir,jr,kr,lr->ijkl", values, a, a, a, a)
    found = monitor.subspace_power_method(T, 3)
    order = found.values.argsort(descending=True)
    return [found.values[order], (found.vectors.mT @ a).abs()[order]]


def watched(W: Tensor) -> Tensor:
    net = nn.Linear(*reversed(W.shape), bias=False, dtype=W.dtype)
    net.weight = nn.Parameter(W)
    with monitor.Monitor(net, every=1, budget=None, kinds=["weights"]) as watch:
        watch.step()
    return torch.tensor(watch.series("sigma_1", "weights", "weight")[1], dtype=torch.float64)


def of_spectrum(formula: Callable[[Tensor], Tensor]) -> Item:
    return Item(matrices("X"), lambda X: formula(svdvals(X)))


MONITOR: dict[str, Item] = {
    "monitor.singular_values": of_spectrum(lambda s: s),
    "monitor.sigma_1": Item(matrices("X", limit=0), lambda X, limit: svdvals(X)[0]),
    "monitor.frobenius": of_spectrum(lambda s: s.square().sum().sqrt()),
    "monitor.nuclear_norm": Item(matrices("X", limit=0), lambda X, limit: svdvals(X).sum()),
    "monitor.rms_to_rms": Item(
        matrices("X"), lambda X: svdvals(X)[0] * (X.shape[1] / X.shape[0]) ** 0.5
    ),
    "monitor.one_to_rms": Item(
        matrices("X"), lambda X: max(x.square().mean() for x in X.mT).sqrt()
    ),
    "monitor.rms_to_inf": Item(
        matrices("X"), lambda X: max(x.square().sum() for x in X).sqrt() * X.shape[1] ** 0.5
    ),
    "monitor.stable_rank": of_spectrum(lambda s: (s / s[0]).square().sum()),
    "monitor.hard_rank": of_spectrum(lambda s: (s**2).sum() ** 2 / (s**4).sum()),
    "monitor.soft_rank": of_spectrum(lambda s: entropy(s**2)),
    "monitor.effective_rank": of_spectrum(entropy),
    "monitor.rankme": Item(matrices("X"), shifted),
    "monitor.spectral_concentration": Item(
        matrices("X", k=2), lambda X, k: (svdvals(X)[:k] ** 2).sum() / (svdvals(X) ** 2).sum()
    ),
    "monitor.alpha_req": Item(matrices("X"), exponent),
    "monitor.farms_alpha": Item(matrices("X", rows=3, ratio=2.0, windows=3), hill),
    "monitor.matrix_nuclear_norm": Item(matrices("X"), columns),
    "monitor.spectral_alignment": Item(layer, cosines, aligned),
    "monitor.AlignmentAlarm": Item(series, collapses, told(monitor.AlignmentAlarm)),
    "monitor.GrowthAlarm": Item(series, growths, told(monitor.GrowthAlarm, window=3)),
    "monitor.cache_norms": Item(
        caches, lambda X: (svdvals(X)[..., 0], svdvals(X).square().sum(-1).sqrt())
    ),
    "monitor.kv_bits": Item(
        lambda *_: {"norms": torch.tensor([[9.0, 1.0], [4.0, 2.5]]), "mean_bits": 2.5, "low": 1,
                    "high": 4},
        best_bits, error_of_bits,
    ),
    "monitor.match_widths": Item(widths, matching, matched),
    "monitor.hessian_product": Item(
        problem, lambda A, w, v: hessian(A, w)[1] @ v, gradient=("w",),
        call=leaf(lambda f, params, v: monitor.hessian_product(f, params, True)([v])),
    ),
    "monitor.top_hessian_eigenvalues": Item(
        problem, top, rtol=1e-6, call=leaf(
            lambda f, params, v: monitor.top_hessian_eigenvalues(f, params, 2, steps=500, tol=1e-9)
            .values),
    ),
    "monitor.hessian_diagonal": Item(
        problem, probes, leaf(lambda f, params, v: monitor.hessian_diagonal(f, params, 5))
    ),
    "monitor.hessian_gradient_product": Item(
        problem, lambda A, w, v: (hessian(A, w)[0], hessian(A, w)[1] @ hessian(A, w)[0]),
        gradient=("w",), call=leaf(lambda f, params, v: [
            x for part in monitor.hessian_gradient_product(f, params, True) for x in part]),
    ),
    "monitor.hessian_alignment": Item(problem, disagreement, environments, ("w",)),
    "monitor.projected_power_iteration": Item(
        covariance, lambda V, B: torch.linalg.eigvalsh(B.mT @ V @ B)[-1], within
    ),
    "monitor.StreamingEigenvector": Item(matrices("X"), oja, streamed),
    "monitor.subspace_power_method": Item(
        terms, lambda values, a: [values, torch.eye(3)], found_terms
    ),
    "monitor.Monitor": Item(matrices("W"), lambda W: svdvals(W)[:1], watched),
}  # fmt: skip
