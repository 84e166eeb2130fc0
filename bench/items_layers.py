"""Rows of orthonorm.nn: layers with normalized or bounded weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from orthonorm import nn as onn
from torch import Tensor, nn
from torch.func import functional_call

from .inputs import Arguments, Inputs
from .items import Item, first, matrices, spectral
from .shapes import Shape

STEADY = 60  # power steps per access
TOGETHER = ("A", "B")


class Weights(nn.Module):
    """Linear layers whose forward returns their weights."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for W in weights:
            layer = nn.Linear(*reversed(W.shape), bias=False, dtype=W.dtype)
            layer.weight = nn.Parameter(W.detach().clone())
            self.layers.append(layer)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


def registered(register: Callable[[Weights], Any]) -> Callable[..., list[Tensor]]:
    """Return the function from weights to their parametrized values; `register` sets it up."""

    def call(**weights: Tensor) -> list[Tensor]:
        model = Weights(*weights.values())
        register(model)
        stem = "parametrizations.weight.original"
        originals = {f"layers.{i}.{stem}": W for i, W in enumerate(weights.values())}
        return functional_call(model, originals, ())

    return call


def each(register: Callable[..., Any], **keywords: Any) -> Callable[..., list[Tensor]]:
    """Return that function for a `register` that takes one layer at a time."""
    return registered(lambda m: [register(layer, **keywords) for layer in m.layers])


def all_of(formula: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    """Return the formula for a list of weights."""
    return lambda **weights: [formula(W) for W in weights.values()]


def unit(W: Tensor) -> Tensor:
    """Return W / sigma_1."""
    return W / torch.linalg.svdvals(W)[0]


def ranked(W: Tensor, target: float = 1.2) -> Tensor:
    """Set sigma_1 to 1, and shrink the others until their squares sum to at most target - 1."""

    def f(s: Tensor) -> Tensor:
        n = s / s[0]
        gamma = ((target - 1) / n[1:].square().sum()).sqrt().clamp(max=1.0)
        return first(gamma * n, lambda x: x / gamma)

    return spectral(W, f)


def layer_of(kind: Any, **keywords: Any) -> Callable[..., Tensor]:
    """Return the function that applies a new parametrization of this kind."""
    return lambda W: kind(W.detach(), STEADY, **keywords)(W)


def with_weight(layer: nn.Module, W: Tensor) -> nn.Module:
    """Give a layer a tensor, which may have a graph, as its weight."""
    del layer.weight
    layer.weight = W
    return layer


def linear(W: Tensor) -> nn.Module:
    return with_weight(nn.Linear(*reversed(W.shape), bias=False), W)


def rescaled(W: Tensor, steps: int = 2) -> Tensor:
    """Return W / t with t of `row_sums`."""
    return W / row_sums(W, steps)


def row_sums(W: Tensor, steps: int) -> Tensor:
    """Return the 2^steps-th roots of the row sums of |(W W^T)^(2^(steps - 1))|."""
    power = torch.linalg.matrix_power(W @ W.mT, 2 ** (steps - 1))
    return power.abs().sum(1, keepdim=True) ** (0.5**steps)


def removed(W: Tensor) -> Tensor:
    """Return the plain weight that remove_spectral_norm leaves."""
    model = onn.spectral_norm_(Weights(W), n_power_iterations=STEADY)
    model()
    return onn.remove_spectral_norm(model).layers[0].weight


def refreshed(W: Tensor) -> Tensor:
    """Return the normalized weight after refresh_vectors_, from the vectors of another matrix."""
    model = onn.spectral_norm_(Weights(W.flip(0)))
    with torch.no_grad():
        model.layers[0].parametrizations.weight.original.copy_(W)
    return onn.refresh_vectors_(model, STEADY).eval()()[0]


# ---- convolutions --------------------------------------------------------------------------------
SIZE = (5,)


def kernel(shape: Shape, inputs: Inputs) -> Arguments:
    m, n = (min(s, 8) for s in shape)
    return {"K": inputs.put(inputs.normal("K", (m, n, 3)))}


def conv(K: Tensor) -> nn.Module:
    return with_weight(nn.Conv1d(K.shape[1], K.shape[0], 3, padding=1, bias=False), K)


def dense(K: Tensor, size: int = SIZE[0]) -> Tensor:
    """Return the convolution with padding 1 as a matrix: a band of blocks."""
    m, n, _ = K.shape
    rows = [
        torch.cat([K[:, :, j - i + 1] if 0 <= j - i + 1 <= 2 else K.new_zeros(m, n)
                   for j in range(size)], 1)
        for i in range(size)
    ]  # fmt: skip
    return torch.cat(rows)


def frequencies(K: Tensor, size: int) -> Tensor:
    return torch.fft.fft(K, size).movedim(-1, 0)


def circular(K: Tensor, size: tuple[int, ...], steps: int) -> Tensor:
    """Return the largest Schatten norm of all frequencies."""
    s = torch.linalg.svdvals(frequencies(K, size[0]))
    return (s**2 ** (steps + 1)).sum(-1).pow(0.5 ** (steps + 1)).max()


def tap_sums(K: Tensor, steps: int) -> Tensor:
    """Return the 2^steps-th roots of the row sums of the kernel of (C C^T)^(2^(steps - 1)).

    The kernel comes from its frequencies on a circle that is long enough.
    """
    A = frequencies(K, 2 ** (steps + 2) * K.shape[-1])
    power = torch.linalg.matrix_power(A @ A.mH, 2 ** (steps - 1))
    return torch.fft.ifft(power, dim=0).real.abs().sum((0, 2)) ** (0.5**steps)


def short(K: Tensor) -> Tensor:
    """Return the adjoint's kernel if that has fewer outputs, else the kernel."""
    return K.transpose(0, 1).flip(-1) if K.shape[0] > K.shape[1] else K


def schatten(W: Tensor, steps: int = 5) -> Tensor:
    s = torch.linalg.svdvals(W)
    return s[0] * (s / s[0]).pow(2 ** (steps + 1)).sum().pow(0.5 ** (steps + 1))


def operator(shape: Shape, inputs: Inputs) -> Arguments:
    K = kernel(shape, inputs)["K"]
    return {"K": K, "x": inputs.put(inputs.normal("x", (K.shape[1], *SIZE)))}


def recurrent(shape: Shape, inputs: Inputs) -> Arguments:
    """Make a convolution of four channels, normalized by many power steps, and its input."""
    torch.manual_seed(0)
    K, x = inputs.put(inputs.normal("K", (4, 4, 3))), inputs.normal("x", (2, 4, *SIZE))
    plain = nn.Conv1d(4, 4, 3, padding=1, bias=False, dtype=K.dtype)
    plain.weight = nn.Parameter(K.clone())
    layer = onn.StableRankConv(plain, SIZE, 2.0, n_power_iterations=500)
    layer(inputs.put(x))
    return {"layer": layer.eval(), "K": K, "x": inputs.put(x)}


def ranked_convolution(layer: nn.Module, K: Tensor, x: Tensor) -> Tensor:
    M = ranked(dense(K), 2.0)
    rows = [(M @ z.mT.flatten()).view(SIZE[0], -1).mT for z in x]
    return torch.stack(rows)


def penalty(A: Tensor, B: Tensor) -> Tensor:
    return sum((schatten(W) - 0.1).clamp(min=0) ** 2 for W in (A, B))


def chain(shape: Shape, inputs: Inputs) -> Arguments:
    W = matrices(*TOGETHER)((min(shape), min(shape)), inputs)
    layers = Weights(*W.values()).layers
    return {"model": nn.Sequential(layers[0], nn.GELU(), layers[1])}


LAYERS: dict[str, Item] = {
    "nn.SpectralNorm": Item(matrices("W"), unit, layer_of(onn.SpectralNorm), ("W",)),
    "nn.SigmaReparam": Item(
        matrices("W"), unit, layer_of(onn.SigmaReparam, gamma="one"), ("W",)
    ),
    "nn.StableRank": Item(
        matrices("W"), ranked, lambda W: onn.StableRank(W.detach(), STEADY, target=1.2)(W)
    ),
    "nn.SpectralRescaling": Item(
        matrices("W"), rescaled, lambda W: onn.SpectralRescaling(2, None)(W), ("W",)
    ),
    "nn.spectral_norm": Item(
        matrices(*TOGETHER), all_of(unit), each(onn.spectral_norm, n_power_iterations=STEADY),
        TOGETHER,
    ),
    "nn.spectral_norm_": Item(
        matrices(*TOGETHER), all_of(unit), gradient=TOGETHER,
        call=registered(lambda m: onn.spectral_norm_(m, n_power_iterations=STEADY)),
    ),
    "nn.sigma_reparam": Item(
        matrices(*TOGETHER), all_of(unit), gradient=TOGETHER,
        call=each(onn.sigma_reparam, n_power_iterations=STEADY, gamma="one"),
    ),
    "nn.sigma_reparam_": Item(
        matrices(*TOGETHER), all_of(unit), gradient=TOGETHER,
        call=registered(
            lambda m: onn.sigma_reparam_(m, n_power_iterations=STEADY, gamma="one")
        ),
    ),
    "nn.stable_rank_norm": Item(
        matrices(*TOGETHER), all_of(ranked),
        each(onn.stable_rank_norm, target=1.2, n_power_iterations=STEADY),
    ),
    "nn.stable_rank_norm_": Item(
        matrices(*TOGETHER), all_of(ranked),
        registered(lambda m: onn.stable_rank_norm_(m, target=1.2, n_power_iterations=STEADY)),
    ),
    "nn.spectral_rescale": Item(
        matrices(*TOGETHER), all_of(rescaled), each(onn.spectral_rescale), TOGETHER
    ),
    "nn.gram_rescaling": Item(matrices("W", steps=3), row_sums, gradient=("W",)),
    "nn.remove_spectral_norm": Item(matrices("W"), unit, removed),
    "nn.refresh_vectors_": Item(matrices("W"), unit, refreshed),
    "nn.ConvOperator": Item(
        operator, lambda K, x: F.conv1d(x, K, padding=1), gradient=("K", "x"),
        call=lambda K, x: onn.ConvOperator(conv(K), SIZE)(K, x),
    ),
    "nn.conv_spectral_norm": Item(
        kernel, lambda K: torch.linalg.svdvals(dense(K))[0], gradient=("K",),
        call=lambda K: onn.conv_spectral_norm(conv(K), SIZE, 400),
    ),
    "nn.StableRankConv": Item(
        recurrent, ranked_convolution, lambda layer, K, x: layer(x), ("x",), rtol=1e-5
    ),
    "nn.conv_circular_bound": Item(
        lambda shape, inputs: kernel(shape, inputs) | {"size": SIZE, "steps": 3}, circular,
        gradient=("K",),
    ),
    "nn.conv_zero_bound": Item(
        lambda shape, inputs: kernel(shape, inputs) | {"steps": 2},
        lambda K, steps: tap_sums(short(K), steps).max(), gradient=("K",),
    ),
    "nn.conv_rescaling": Item(
        lambda shape, inputs: kernel(shape, inputs) | {"steps": 2},
        lambda K, steps: tap_sums(K, steps), gradient=("K",),
        call=lambda K, steps: onn.conv_rescaling(K, steps).flatten(),
    ),
    "nn.layer_bound": Item(
        matrices("W"), schatten, lambda W: onn.layer_bound(linear(W)), ("W",)
    ),
    "nn.norm_penalty": Item(
        matrices(*TOGETHER), penalty, gradient=TOGETHER,
        call=lambda A, B: onn.norm_penalty([linear(A), linear(B)], threshold=0.1, power=2.0),
    ),
    "nn.lipschitz_report": Item(
        chain, lambda model: math.prod(schatten(m.weight) for m in (model[0], model[2])) * 1.129,
        lambda model: onn.lipschitz_report(model).bound,
    ),
}  # fmt: skip
