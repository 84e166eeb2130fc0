"""gram, symmetric_update, apply: the dispatched kernels against their definitions in float64; and
the polynomials made of them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import orthonorm  # noqa: F401 - loads the kernels
import pytest
import torch
from moments import compiled
from orthonorm.ops.words import (
    apply,
    direct_polynomial,
    gram,
    gram_form,
    gram_polynomial,
    segments,
    symmetric_update,
    triples_of,
)
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),
    (1, 37),
    (37, 1),
    (2, 3),
    (31, 33),
    (64, 64),
    (97, 211),
    (149, 83),
    (48, 1000),
    (3, 41, 67),
    (2, 3, 17, 19),
    (17, 5, 9),
]
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def symmetric(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    A = normal(*shape, shape[-1], dtype=torch.float64, seed=seed)
    return ((A + A.mT) / shape[-1] ** 0.5).to(dtype)


def layouts(X: Tensor) -> dict[str, Tensor]:
    """The same numbers in memory that is contiguous, transposed, or part of something larger."""
    wide = X.new_full((*X.shape[:-2], X.shape[-2] + 2, 2 * X.shape[-1] + 3), float("nan"))
    wide[..., 1 : 1 + X.shape[-2], 1 : 1 + 2 * X.shape[-1] : 2] = X
    return {
        "contiguous": X,
        "transposed": X.mT.contiguous().mT,
        "sliced": wide[..., 1 : 1 + X.shape[-2], 1 : 1 + 2 * X.shape[-1] : 2],
    }


def exact(op, args: tuple) -> np.ndarray:
    """The definition in float64; for float64 inputs in long double, whose products NumPy forms."""
    if args[0].dtype != torch.float64:
        wide = [a.double() if isinstance(a, Tensor) else a for a in args]
        return op.reference(*wide).numpy()
    long = [a.numpy().astype(np.longdouble) if isinstance(a, Tensor) else a for a in args]
    if op is gram:
        return long[0] @ long[0].swapaxes(-1, -2)
    if op is apply:
        X, B, a, b = (*long, 1.0)[:4]
        return a * X + b * (B @ X)
    C, A, B, alpha, beta = long
    lower = np.tril(beta * C + alpha * (A @ B))
    return lower + np.tril(lower, -1).swapaxes(-1, -2)


def error(got: Tensor, want: np.ndarray) -> float:
    return float(np.abs(got.double().numpy() - want).max(initial=0.0))


def assert_within_twice(op, args: tuple) -> Tensor:
    """err(kernel) <= 2 err(same-dtype torch), both against the definition in more digits."""
    got, same, want = op(*args), op.reference(*args), exact(op, args)
    assert got.dtype == same.dtype and got.shape == same.shape and got.is_contiguous()
    # One rounding of the largest result is unavoidable where torch happens to be exact.
    rounding = torch.finfo(got.dtype).eps / 2 * float(np.abs(want).max(initial=0.0))
    assert error(got, want) <= 2 * max(error(same, want), rounding)
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_against_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, m = shape[:-2], shape[-2]
    B = normal(*batch, m, m, dtype=dtype, seed=1) / max(m, 1) ** 0.5
    A = symmetric(*batch, m, dtype=dtype, seed=2)
    for X in layouts(normal(*shape, dtype=dtype)).values():
        G = assert_within_twice(gram, (X,))
        assert torch.equal(G, G.mT)
        assert_within_twice(apply, (X, B, 3.4445, -1.5))
        assert_within_twice(apply, (X, B.mT, 0.0))
    for C in layouts(A).values():
        S = assert_within_twice(symmetric_update, (C, C, A, 2.0315, -4.775))
        assert torch.equal(S, S.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 0), (5, 0)], ids=str)
def test_words_of_nothing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    X = torch.zeros(shape, dtype=dtype)
    square = torch.ones(*shape[:-1], shape[-2], dtype=dtype)
    assert torch.equal(gram(X), torch.zeros_like(square))
    assert apply(X, square, 2.0).shape == X.shape
    assert symmetric_update(square, square, square, 1.0, 1.0).shape == square.shape


def words(X: Tensor, B: Tensor) -> list[Tensor]:
    A = gram(X)
    return [A, symmetric_update(A, A, A, 0.5, -1.0), apply(X, B, 1.5, 0.25)]


def polynomials(X: Tensor) -> list[Tensor]:
    forms = [direct_polynomial(X, QUINTIC), gram_form(X, QUINTIC, [2])]
    return [*forms, gram_polynomial(gram(X), QUINTIC)]


QUINTIC = [3.4445, -4.7750, 2.0315] * 4
MIXED = [1.5, -0.5, 0.0, 3.4445, -4.7750, 2.0315, 1.5, -0.5, 0.0, 1.5, -0.5, 0.0]


@compiled
@pytest.mark.parametrize("coefficients", [QUINTIC, MIXED, QUINTIC[:3], MIXED[:3]], ids=len)
@pytest.mark.parametrize("shape", [*SHAPES, (257, 771), (4, 200, 333), (700, 50)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_polynomials_have_the_bits_of_the_words(
    dtype: torch.dtype, shape: tuple[int, ...], coefficients: list[float]
) -> None:
    """Kernels that keep matrices packed round where gram, symmetric_update and apply round; the
    Gram form keeps 16-bit matrices in float32 instead."""
    size = shape[-1] ** 0.5 + shape[-2] ** 0.5
    for X in layouts((normal(*shape) / size).to(dtype)).values():
        want = X if shape[-2] <= shape[-1] else X.mT
        for a, b, c in triples_of(coefficients):
            A = gram(want)
            want = apply(
                want, A if c == 0 else symmetric_update(A, A, A, c, b), a, b if c == 0 else 1
            )
        want = want if want.shape == X.shape else want.mT
        got = direct_polynomial(X, coefficients)
        assert got.is_contiguous() and torch.equal(got, want)
    R = W = gram(X).to(torch.promote_types(dtype, torch.float32))
    Q = None
    for a, b, c in triples_of(coefficients):
        Z, z = (W, b) if c == 0 else (symmetric_update(W, W, W, c, b), 1.0)
        first = z * Z + a * torch.eye(shape[-2], dtype=Z.dtype)
        Q = first if Q is None else symmetric_update(Q, Q, Z, z, a)
        V = symmetric_update(W, W, Z, z, a)
        W = symmetric_update(V, V, Z, z, a)
    got = gram_polynomial(R, coefficients)
    assert torch.equal(got, got.mT) and torch.equal(got, Q)


@compiled
@pytest.mark.parametrize("restarts", [[], [2], [1, 2, 3]], ids=len)
@pytest.mark.parametrize("shape", [(5, 9), (3, 33, 70), (257, 771), (700, 50)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_form_has_the_bits_of_its_words(
    dtype: torch.dtype, shape: tuple[int, ...], restarts: list[int]
) -> None:
    """16-bit matrices have a Gram matrix and a chain in float32."""
    X = (normal(*shape) / (shape[-1] ** 0.5 + shape[-2] ** 0.5)).to(dtype)
    for x in layouts(X).values():
        Y = x if shape[-2] <= shape[-1] else x.mT
        for segment in segments(triples_of(QUINTIC), restarts):
            R = gram(Y.to(torch.promote_types(dtype, torch.float32)))
            Q = gram_polynomial(R, [c for triple in segment for c in triple])
            Y = apply(Y, Q.to(dtype), 0.0)
        got = gram_form(x, QUINTIC, restarts)
        assert got.is_contiguous() and got.shape == x.shape
        want = Y if Y.shape == x.shape else Y.mT
        if dtype == torch.bfloat16:  # pairs of products are summed before they are added
            assert (got.double() - want.double()).norm() <= 2**-8 * want.double().norm()
        else:
            assert torch.equal(got, want)


@compiled
def test_a_matrix_too_large_to_be_packed_whole() -> None:
    """2^26 elements go slab by slab, to the same numbers as the definition's."""
    X = normal(2, 2**25 + 1, dtype=torch.bfloat16) / 2**14
    got = direct_polynomial(X, QUINTIC)
    for columns in (slice(0, 1000), slice(-1000, None)):
        A = gram(X.float())
        want = X[:, columns].double()
        B = torch.eye(2).double()
        W = A.double()
        for a, b, c in triples_of(QUINTIC):
            P = a * torch.eye(2).double() + b * W + c * W @ W
            B, W = P @ B, P @ W @ P
        assert (got[:, columns].double() - B @ want).norm() <= 2**-6 * (B @ want).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 20, 31), (3, 200, 300), (2, 2, 65, 129)], ids=str)
def test_batch_and_threads_change_no_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    X = normal(*shape, dtype=dtype)
    B = normal(*shape[:-1], shape[-2], dtype=dtype, seed=3)
    X /= 64
    together = words(X, B) + polynomials(X)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert all(map(torch.equal, words(X, B) + polynomials(X), together))
    finally:
        torch.set_num_threads(threads)
    flat = [t.flatten(0, -3) for t in together]
    for i, (x, b) in enumerate(zip(X.flatten(0, -3), B.flatten(0, -3), strict=True)):
        alone = words(x, b) + polynomials(x)
        assert all(torch.equal(one, many[i]) for one, many in zip(alone, flat, strict=True))


def test_batch_strides_that_do_not_collapse() -> None:
    X = normal(4, 6, 10, 12)[::2, ::3]
    B = normal(1, 1, 10, 10, seed=4).expand(2, 2, 10, 10)
    assert torch.equal(gram(X), gram(X.contiguous()))
    assert torch.equal(apply(X, B, 1.0), apply(X.contiguous(), B.contiguous(), 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_stay_in_their_matrix(dtype: torch.dtype, value: float) -> None:
    X = normal(3, 37, 53, dtype=dtype)
    B = normal(3, 37, 37, dtype=dtype, seed=5) / 6
    clean = words(X, B)
    X[1, 36, 52] = value
    for dirty, before in zip(words(X, B), clean, strict=True):
        assert torch.equal(dirty[0], before[0]) and torch.equal(dirty[2], before[2])
        assert not torch.isfinite(dirty[1]).all()
    assert torch.isfinite(gram(X)[1, :36, :36]).all()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales(scale: float) -> None:
    X, B = normal(40, 70) * scale, normal(40, 40, seed=6)
    assert_within_twice(gram, (X,))
    assert_within_twice(apply, (X, B, 2.0))
    assert_within_twice(apply, (X * scale, B, 2.0))


def test_subnormal_numbers() -> None:
    X, B = normal(20, 30) * 1e-40, normal(20, 20, seed=7)
    assert_within_twice(apply, (X, B, 2.0))
    assert error(apply(X, B, 2.0), exact(apply, (X, B, 2.0))) < 1e-43


def test_inputs_are_not_written() -> None:
    X, B = normal(33, 47), normal(33, 33, seed=8)
    before = X.clone(), B.clone()
    words(X, B)
    assert torch.equal(X, before[0]) and torch.equal(B, before[1])


def test_kernels_check_shapes_themselves() -> None:
    op = torch.ops.orthonorm
    with pytest.raises((RuntimeError, ValueError), match="apply"):
        op.apply(torch.ones(3, 4), torch.ones(4, 4), 1.0)
    with pytest.raises((RuntimeError, ValueError), match="apply"):
        op.apply(torch.ones(3, 4), torch.ones(3, 3).double(), 1.0)
    with pytest.raises((RuntimeError, ValueError), match="symmetric_update"):
        op.symmetric_update(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises((RuntimeError, ValueError), match="gram"):
        op.gram(torch.ones(3))


PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_words as t
for dtype in t.DTYPES:
    for shape in [(1, 1), (37, 1), (31, 33), (97, 211), (48, 1000), (3, 41, 67)]:
        t.test_words_against_float64(dtype, shape)
        t.test_packed_polynomials_have_the_bits_of_the_words(dtype, shape, t.MIXED)
    t.test_batch_and_threads_change_no_bit(dtype, (3, 100, 150))
    t.test_non_finite_numbers_stay_in_their_matrix(dtype, float("inf"))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa: str) -> None:
    """In a process each; names this processor lacks fall back to what it has."""
    environment = {**os.environ, "ORTHONORM_ISA": isa}
    code = PROGRAM.format(tests=os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
