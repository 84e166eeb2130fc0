"""Makers of the arguments of every op from a list of shapes; `cases.py` has the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from orthonorm._polynomials import KELLER as QUINTIC
from orthonorm.ops.blocks import scales_shape
from torch import Tensor

from .inputs import Arguments, Inputs, place
from .shapes import Shape

KELLER = [*QUINTIC] * 5
Make = Callable[[Sequence[Shape], Inputs], Arguments]


def each(make: Callable[[str, Shape], Tensor], tag: str, shapes: Sequence[Shape]) -> list[Tensor]:
    """Make a tensor of each shape, with tags of their own."""
    return [make(f"{tag}[{i}]", shape) for i, shape in enumerate(shapes)]


def matrix(name: str, **keywords: Any) -> Make:
    """Return the maker of ops on one matrix, plus fixed keywords."""
    return lambda shapes, inputs: {name: inputs.matrix(name, shapes[0]), **keywords}


def _symmetric(inputs: Inputs, shape: Shape) -> Tensor:
    """Return a Gram matrix of the shape's rows with norm near 1: float64, bitwise symmetric."""
    x = inputs.normal("A", shape).double()
    A = x @ x.mT / max(1, sum(shape[-2:]))
    return A.tril() + A.tril(-1).mT


def symmetric_update(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    A = _symmetric(inputs, shapes[0])
    B = 0.5 * A + A @ A
    C = A - 0.25 * B
    lower = (C, A, B.tril() + B.tril(-1).mT)
    C, A, B = (inputs.put(t.tril() + t.tril(-1).mT) for t in lower)
    return {"C": C, "A": A, "B": B, "alpha": QUINTIC[2], "beta": QUINTIC[1]}


def gram_update(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = inputs.matrix("X", shapes[0])
    A = _symmetric(inputs, shapes[0])  # positive semidefinite as X X^T, so the sum cannot cancel
    return {"A": inputs.put(A), "X": X, "alpha": 0.25, "beta": 0.75}


def gram_polynomial(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    """Make a Gram matrix of trace 1, as of a matrix divided by its Frobenius norm.

    It is kept away from singular ones, for which float64 is too coarse to be an oracle.
    """
    R = _symmetric(inputs, shapes[0])
    n = max(1, R.shape[-1])
    trace = R.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)
    R = 0.9 * R / trace[..., None, None] + 0.1 / n * torch.eye(n, dtype=R.dtype)[: R.shape[-1]]
    return {"R": inputs.put(R), "coefficients": list(KELLER)}


def direct_polynomial(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    """Make a matrix of norm below about 1/8, small enough for the iteration to amplify errors."""
    n, m = shapes[0][-2:]
    X = inputs.matrix("X", shapes[0]).double() / (8 * max(1.0, n**0.5 + m**0.5))
    return {"X": inputs.put(X), "coefficients": list(KELLER)}


def gram_form(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    """Make a matrix with singular values between about 1/16 and 3/16.

    For small ones float64 is too coarse an oracle of the chain on the Gram matrix.
    """
    n, m = shapes[0][-2:]
    made = direct_polynomial(shapes, inputs)
    X = made["X"].double() / 2 + torch.eye(n, m, dtype=torch.float64, device=inputs.device) / 8
    return {**made, "X": inputs.put(X), "restarts": []}


def polar_iteration(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    """Make a matrix far from singular: errors of a polar factor grow with the condition."""
    return {"X": gram_form(shapes, inputs)["X"]}


def apply(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    B = inputs.put(_symmetric(inputs, shapes[0]))
    return {"X": inputs.matrix("X", shapes[0]), "B": B, "a": QUINTIC[0], "b": 0.75}


def newton_schulz(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = each(inputs.matrix, "X", shapes)
    return {"X": X, "coefficients": list(KELLER), "restarts": []}


def small_newton_schulz(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = each(inputs.matrix, "X", shapes)
    return {"X": X, "coefficients": list(KELLER), "dtype": inputs.dtype}


def divide_each(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = inputs.matrix("X", shapes[0])
    norms = torch.linalg.vector_norm(X.double(), dim=(-2, -1)).reshape(-1)
    return {"X": X, "divisors": norms, "dtype": inputs.dtype}


def scaled_polynomial(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    """Make the matrix of `gram_form`, with its norm as divisor."""
    made = gram_form(shapes, inputs)
    norms = torch.linalg.matrix_norm(made["X"].double()).reshape(-1)
    return {**made, "divisors": norms, "gram": False, "dtype": inputs.dtype}


def source(arguments: Arguments) -> Tensor:
    """Return what `scaled_polynomial_` reads in place of X, in another memory layout."""
    return place(2 * arguments["X"], "transposed")


def magnitude(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {"X": each(inputs.matrix, "X", shapes)}


def norms(arguments: Arguments) -> Tensor:
    """Return |X|_F of every matrix, for ops that accept norms measured by their caller."""
    parts = [torch.linalg.matrix_norm(x.double()).reshape(-1) for x in arguments["X"]]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def scales(arguments: Arguments) -> Tensor:
    device = arguments["X"][0].device if arguments["X"] else None
    return torch.linspace(0.5, 2.0, len(arguments["X"]), dtype=torch.float64, device=device)


def rotated_adam(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "exp_avg": each(inputs.state, "exp_avg", shapes),
        "exp_avg_sq": each(inputs.moment, "exp_avg_sq", shapes),
        "X": each(inputs.matrix, "X", shapes),
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
    }


def elementwise_moment(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "moments": each(inputs.moment, "moments", shapes),
        "X": each(inputs.matrix, "X", shapes),
        "beta2": 0.999,
        "eps": 1e-8,
    }


def inner(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {"X": each(inputs.state, "X", shapes), "Y": each(inputs.matrix, "Y", shapes)}


def moments(rows: str, columns: str) -> Make:
    """Return the maker of moments per row, per column or both; "" leaves one out."""

    def make(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
        made: Arguments = {}
        if rows:
            made[rows] = each(inputs.moment, rows, [(*s[:-1], 1) for s in shapes])
        if columns:
            made[columns] = each(inputs.moment, columns, [(*s[:-2], 1, s[-1]) for s in shapes])
        return {**made, "X": each(inputs.matrix, "X", shapes), "beta2": 0.95, "eps": 1e-8}

    return make


def power_iteration(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "W": each(inputs.matrix, "W", shapes),
        "u": each(inputs.unit, "u", [s[:-1] for s in shapes]),
        "v": each(inputs.unit, "v", [(*s[:-2], s[-1]) for s in shapes]),
    }


def spectral_normalization(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    made = power_iteration(shapes, inputs)
    return {"out": [torch.zeros_like(w) for w in made["W"]], **made}


def spectral_normalization_gradient(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    W = each(inputs.matrix, "W", shapes)
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    pairs = [
        inputs.normal(f"vectors[{i}]", (*s[:-2], s[-2] + s[-1])) / max(1, max(s[-2:])) ** 0.5
        for i, s in enumerate(shapes)
    ]
    vectors = torch.cat([p.flatten() for p in pairs]) if pairs else torch.empty(0)
    return {
        "grads": each(inputs.matrix, "grads", shapes),
        "W": W,
        "sigma": norms({"X": W}).to(wide),
        "vectors": inputs.put(vectors, wide),
    }


def muon_prologue(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "grads": each(inputs.matrix, "grads", shapes),
        "momentum_buffers": each(inputs.state, "momentum_buffers", shapes),
        "updates": each(inputs.state, "updates", shapes),
        "momentum": inputs.number(0.95),
    }


def factors(arguments: Arguments) -> list[float]:
    return [0.5 + 0.25 * i for i in range(len(arguments["params"]))]


def no_decay(arguments: Arguments) -> Tensor:
    return torch.zeros_like(arguments["lr"])


def seed(arguments: Arguments) -> Tensor:
    """Return a seed of stochastic rounding that has bits in both 32-bit halves."""
    return torch.tensor(-0x123456789ABCDEF, device=arguments["lr"].device)


def decayed_update(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "params": each(inputs.matrix, "params", shapes),
        "updates": each(inputs.state, "updates", shapes),
        "lr": inputs.number(0.02),
        "weight_decay": inputs.number(0.1),
        "factors": [1.0] * len(shapes),
    }


def accumulate(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    sizes = [inputs.put(torch.zeros(s[:-1]), torch.float64) for s in shapes]
    sums, X = each(inputs.state, "sums", shapes), each(inputs.matrix, "X", shapes)
    return {"sums": sums, "X": X, "sizes": sizes}


def _rows(shapes: Sequence[Shape], inputs: Inputs) -> tuple[list[Tensor], list[Shape]]:
    """Return indices of half of the rows of each matrix, and the shapes of these rows."""
    drawn = [inputs.normal(f"rows[{i}]", s[:-1]).argsort(-1) for i, s in enumerate(shapes)]
    some = [d[..., : (d.shape[-1] + 1) // 2] for d in drawn]
    pairs = zip(some, shapes, strict=True)
    return [inputs.put(r, torch.int64) for r in some], [(*r.shape, s[-1]) for r, s in pairs]


def take_rows(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    rows, taken = _rows(shapes, inputs)
    X = each(inputs.matrix, "X", shapes)
    out = [torch.zeros_like(y) for y in each(inputs.matrix, "out", taken)]
    return {"X": X, "rows": rows, "factor": inputs.number(0.75), "out": out}


def update_rows(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    rows, taken = _rows(shapes, inputs)
    made = decayed_update(shapes, inputs)
    return {**made, "rows": rows, "updates": each(inputs.state, "updates", taken)}


def adamw_step(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "params": each(inputs.matrix, "params", shapes),
        "grads": each(inputs.matrix, "grads", shapes),
        "exp_avg": each(inputs.state, "exp_avg", shapes),
        "exp_avg_sq": each(inputs.moment, "exp_avg_sq", shapes),
        "steps": [inputs.number(3.0 + i) for i in range(len(shapes))],
        "lr": inputs.number(3e-2),
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": inputs.number(0.1),
    }


def muon_step(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "params": each(inputs.matrix, "params", shapes),
        "grads": each(inputs.matrix, "grads", shapes),
        "momentum_buffers": each(inputs.state, "momentum_buffers", shapes),
        "lr": inputs.number(0.02),
        "momentum": inputs.number(0.95),
        "weight_decay": inputs.number(0.1),
        "factors": [1.0] * len(shapes),
        "coefficients": list(KELLER),
        "restarts": [],  # those that Muon finds safe for these coefficients in float32
    }


def signum_step(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    made = muon_step(shapes, inputs)
    return {k: v for k, v in made.items() if k not in ("coefficients", "restarts")}


def normalize_columns(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = each(inputs.matrix, "X", shapes)
    return {"out": [torch.zeros_like(x) for x in X], "X": X}


def mean_sinh_square(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    made = magnitude(shapes, inputs)
    return {**made, "divisors": norms(made)}


def _scales(inputs: Inputs, shapes: Sequence[Shape]) -> list[Tensor]:
    made = [inputs.normal(f"scales[{i}]", scales_shape(s)).abs() for i, s in enumerate(shapes)]
    return [inputs.put(s, torch.float32) for s in made]


def quantize_blocks(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = each(inputs.matrix, "X", shapes)
    codes = [inputs.put(torch.zeros(x.shape), torch.uint8) for x in X]
    return {"codes": codes, "scales": _scales(inputs, shapes), "X": X}


def _codes(inputs: Inputs, tag: str, shape: Shape) -> Tensor:
    return inputs.put((128 + 40 * inputs.normal(tag, shape)).clamp(0, 255), torch.uint8)


def dequantize_blocks(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    return {
        "out": [torch.zeros_like(x) for x in each(inputs.matrix, "X", shapes)],
        "codes": each(partial(_codes, inputs), "codes", shapes),
        "scales": _scales(inputs, shapes),
    }


def coded_adamw_step(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    made = adamw_step(shapes, inputs)
    coded = {
        name: each(partial(_codes, inputs), name, shapes) for name in ("exp_avg", "exp_avg_sq")
    }
    scales = {f"{name}_scales": _scales(inputs, shapes) for name in coded}
    first = ("params", "grads")
    return (
        {name: made.pop(name) for name in first}
        | coded
        | scales
        | {name: value for name, value in made.items() if name not in coded}
    )


def normuon_step(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    moments = each(inputs.moment, "row_moments", [(*s[:-1], 1) for s in shapes])
    return {**muon_step(shapes, inputs), "row_moments": moments, "beta2": 0.95, "norm_eps": 1e-10}


def conda_step(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    scales = [0.02 + 0.01 * i for i in range(len(shapes))]
    return {
        "params": each(inputs.matrix, "params", shapes),
        "grads": each(inputs.matrix, "grads", shapes),
        "exp_avg": each(inputs.state, "exp_avg", shapes),
        "exp_avg_sq": each(inputs.moment, "exp_avg_sq", shapes),
        "bases": each(inputs.basis, "bases", shapes),
        "scales": inputs.numbers(scales),
        "lr": inputs.number(1e-2),
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": inputs.number(0.1),
    }


def rotate(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    X = inputs.matrix("X", shapes[0])
    return {"out": torch.zeros_like(X), "X": X, "Q": inputs.basis("Q", shapes[0])}


def rotate_back(shapes: Sequence[Shape], inputs: Inputs) -> Arguments:
    W, N = (inputs.matrix(name, shapes[0]) for name in ("W", "N"))
    return {"W": W, "N": N, "Q": inputs.basis("Q", shapes[0]), "decay": inputs.number(0.875)}
