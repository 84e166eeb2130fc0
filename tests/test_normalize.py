"""Row, column and factored moments and norms: errors at every layout, dtype and scale, edges."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from moments import (
    BF16,
    EPS,
    EPS_AT,
    F16,
    F32,
    F64,
    LAYOUTS,
    assert_rule,
    check_moment,
    check_norm,
    compiled,
    generator,
    matrix,
    moments,
    norms,
    places,
    state,
    updated,
)
from orthonorm._library import OPS

SHAPES = [(1, 1), (1, 7), (13, 1), (2, 2), (7, 5), (37, 53), (3, 11, 17), (2, 1, 3, 8, 9)]
# More rows and columns than a unit of work has, in both directions.
LARGE = [(300, 1100), (1100, 70), (9000, 8)]
EMPTY = [(0, 3), (3, 0), (0, 0), (0, 2, 3), (2, 0, 3)]


# ---- the error rule ------------------------------------------------------------------------------
MIXES = [(F32, F32), (BF16, F32), (F16, F32), (F32, BF16), (BF16, BF16), (F32, F64), (F16, F16)]


@moments
@places
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_moment_error(name: str, eps_at: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for shape, eps, keep in itertools.product(SHAPES, EPS, (True, False)):
        check_moment(name, shape, "contiguous", dtypes, 0.9, eps, eps_at, keep)


@moments
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moment_layouts(name: str, layout: str) -> None:
    for shape, dtype, keep in itertools.product(SHAPES, (F32, BF16), (True, False)):
        check_moment(name, shape, layout, (dtype, F32), 0.9, 1e-10, "outside", keep)


@moments
@pytest.mark.parametrize("layout", ("contiguous", "transposed", "padded"))
def test_moment_large(name: str, layout: str) -> None:
    for shape, eps_at, keep in itertools.product(LARGE, EPS_AT, (True, False)):
        check_moment(name, shape, layout, (F32, F32), 0.9, 1e-3, eps_at, keep)
    check_moment(name, LARGE[0], layout, (BF16, F32), 0.9, 1e-8, "inside", True)


@norms
@places
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=lambda d: str(d)[6:])
def test_norm_error(name: str, eps_at: str, dtype: torch.dtype) -> None:
    for shape, layout, eps in itertools.product(SHAPES, LAYOUTS, (0.0, 0.7)):
        check_norm(name, shape, layout, dtype, 1.7, eps, eps_at)


@norms
def test_norm_large(name: str) -> None:
    for shape, layout in itertools.product(LARGE, ("contiguous", "transposed", "padded")):
        check_norm(name, shape, layout, F32, 0.3, 1e-8)


# ---- float64 against long double -----------------------------------------------------------------
Long = np.longdouble
extended = pytest.mark.skipif(
    np.finfo(Long).eps > 1e-18, reason="long double is no wider than double here"
)


def long_denominator(root: Any, eps: float, eps_at: str) -> Any:
    if eps_at == "inside":
        return np.sqrt(root * root + Long(eps))
    return np.maximum(root, Long(eps)) if eps_at == "clamp" else root + Long(eps)


def long_moment(
    name: str, arrays: list[Any], beta2: float, eps: float, eps_at: str, keep: bool
) -> Any:
    """The definitions once more, in long double: new moments and X."""
    *old, x = arrays
    decay = Long(beta2)
    rows = decay * old[0] + (1 - decay) * np.mean(x * x, -1, keepdims=True)
    columns = decay * old[-1] + (1 - decay) * np.mean(x * x, -2, keepdims=True)
    square = {"row_moment_": rows, "column_moment_": columns}.get(
        name, rows * columns / np.mean(rows, -2, keepdims=True)
    )
    y = x / long_denominator(np.sqrt(square), eps, eps_at)
    if keep:
        size = [np.sqrt(np.sum(t * t, (-2, -1), keepdims=True)) for t in (x, y)]
        y = y * (size[0] / size[1])
    return [*{"row_moment_": [rows], "column_moment_": [columns]}.get(name, [rows, columns]), y]


def rms(value: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(value, Long)))))


@extended
@moments
@places
def test_moment_error_float64(name: str, eps_at: str) -> None:
    """Root mean squares over many matrices: on few elements a reference may be exact by luck."""
    for eps, keep in itertools.product(EPS, (True, False)):
        ours, theirs = [], []
        for seed, shape in enumerate([(37, 53), (64, 64), (5, 300), (300, 5)] * 3):
            tensors = [*state(name, shape, F64, seed), matrix(shape, F64, seed)]
            arrays = [t.numpy().astype(Long) for t in tensors]
            exact = long_moment(name, arrays, 0.9, eps, eps_at, keep)
            for f, errors in ((OPS[name], ours), (OPS[name].reference, theirs)):
                for got, e in zip(updated(f, tensors, 0.9, eps, eps_at, keep), exact, strict=True):
                    errors.append(rms((got.numpy() - e) / e))
        assert rms(ours) <= 2 * rms(theirs), (eps, keep)


def long_norm(name: str, x: Any, scale: float, eps: float, eps_at: str) -> Any:
    axis = -1 if name == "row_normalize" else -2
    norm = np.sqrt(np.sum(x * x, axis, keepdims=True)) * Long(scale)
    if eps_at == "inside":
        return x / np.sqrt(norm * norm + Long(eps))
    return x / (np.maximum(norm, Long(eps)) if eps_at == "clamp" else norm + Long(eps))


@extended
@norms
@places
@pytest.mark.parametrize("size", (1.0, 1e-200, 1e-300, 1e200, 1e300))
def test_norm_error_float64(name: str, eps_at: str, size: float) -> None:
    """At any scale: long double's exponents reach further, so its squares need no care."""
    ours, theirs = [], []
    for seed, layout in enumerate(list(LAYOUTS) * 2):
        x = LAYOUTS[layout](matrix((37, 53), F64, seed) * size)
        exact = long_norm(name, x.numpy().astype(Long), 0.5, 0.3 * size, eps_at)
        for f, errors in ((OPS[name], ours), (OPS[name].reference, theirs)):
            errors.append(rms((f(x, 0.5, 0.3 * size, eps_at).numpy() - exact) / exact))
    assert rms(ours) <= 2 * rms(theirs)


# ---- scales, zeros, what is not finite -----------------------------------------------------------
@norms
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=lambda d: str(d)[6:])
def test_norm_is_right_at_every_scale(name: str, dtype: torch.dtype) -> None:
    x = matrix((33, 70), F64)
    for size in (1e36, 1e-35, 1e-40) + ((1e150, 1e-290) if dtype == F64 else ()):
        y = (x * size).to(dtype)
        exact = OPS[name].reference(y.double())
        assert_rule(OPS[name](y), OPS[name].reference(y), exact, size)
        dim = -1 if name == "row_normalize" else -2
        lengths = torch.linalg.vector_norm(OPS[name](y).double(), dim=dim)
        present = (y != 0).any(dim).double()  # a row may vanish in bfloat16
        assert (lengths - present).abs().max() < 2 * torch.finfo(dtype).eps


@norms
def test_rows_of_all_scales_at_once(name: str) -> None:
    sizes = torch.tensor([1e36, 1.0, 1e-40, 0.0, 1e-20, 3e38])
    x = torch.rand(6, 9, generator=generator(0)).add_(0.1) * sizes[:, None]
    x = x if name == "row_normalize" else x.mT.contiguous()
    got = OPS[name](x)
    assert_rule(got, OPS[name].reference(x), OPS[name].reference(x.double()), name)
    dim = -1 if name == "row_normalize" else -2
    ones = torch.linalg.vector_norm(got.double(), dim=dim)
    torch.testing.assert_close(ones, (sizes != 0).double(), rtol=1e-6, atol=0)


@compiled
@moments
@pytest.mark.parametrize("size", (1e36, 1e-40, 1e-30))
def test_moments_do_not_overflow_inside(name: str, size: float) -> None:
    """Squares beyond float32 are no trouble within a call (a stored moment may be infinite)."""
    x = matrix((33, 70), F64).mul(size).to(F32)
    tensors = [*(s.zero_() for s in state(name, x.shape)), x]
    for keep in (True, False):
        got = updated(OPS[name], tensors, 0.9, 0.0, "outside", keep)[-1]
        exact = updated(OPS[name].reference, tensors, 0.9, 0.0, "outside", keep, to=F64)[-1]
        assert_rule(got, exact.to(F32), exact, (size, keep))


@moments
@places
@pytest.mark.parametrize("eps", (0.0, 1e-10))
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=lambda d: str(d)[6:])
def test_zeros_stay_zeros(name: str, eps_at: str, eps: float, dtype: torch.dtype) -> None:
    for keep in (True, False):
        x = matrix((7, 9), dtype)
        x[2], x[:, 3] = 0, 0
        batch = torch.stack([x, torch.zeros_like(x)])
        tensors = [*(s.zero_() for s in state(name, batch.shape)), batch]
        got = updated(OPS[name], tensors, 0.9, eps, eps_at, keep)[-1]
        assert got.isfinite().all() and got[0].any()
        assert not got[0, 2].any() and not got[0, :, 3].any() and not got[1].any()


@norms
@places
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=lambda d: str(d)[6:])
def test_norm_of_zeros(name: str, eps_at: str, dtype: torch.dtype) -> None:
    x = matrix((7, 9), dtype)
    x[2], x[:, 3] = 0, 0
    for scale, eps in ((1.0, 0.0), (1.0, 1e-8), (0.0, 0.0)):
        got = OPS[name](x, scale, eps, eps_at)
        assert got.isfinite().all() and not got[2].any() and not got[:, 3].any()
        assert not OPS[name](torch.zeros_like(x), scale, eps, eps_at).any()


@moments
@places
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_finite_stays_in_its_matrix(name: str, eps_at: str, bad: float) -> None:
    for keep, dtype in itertools.product((True, False), (F32, BF16)):
        args = (0.9, 1e-8, eps_at, keep)
        clean = [*state(name, (3, 20, 30)), matrix((3, 20, 30), dtype)]
        spoiled = [t.clone() for t in clean]
        spoiled[-1][1, 4, 5] = bad
        want, got = updated(OPS[name], clean, *args), updated(OPS[name], spoiled, *args)
        for w, g in zip(want, got, strict=True):
            assert torch.equal(w[0], g[0]) and torch.equal(w[2], g[2])
        peer = updated(OPS[name].reference, spoiled, *args)
        for g, p in zip(got[:-1], peer[:-1], strict=True):
            assert torch.equal(g.isnan(), p.isnan()), (keep, dtype)
        # where the definition multiplies 0 by inf, a kernel may have a number
        assert not (got[-1].isnan() & ~peer[-1].isnan()).any(), (keep, dtype)
        assert got[-1][1, 4, 5].isnan(), (keep, dtype)


@norms
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_norm_of_what_is_not_finite(name: str, bad: float) -> None:
    x = matrix((2, 20, 30))
    want = OPS[name](x)
    x[1, 4, 5] = bad
    got, peer = OPS[name](x), OPS[name].reference(x)
    assert torch.equal(got.isnan(), peer.isnan()) and got[1, 4, 5].isnan()
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[(1, 4) if name == "row_normalize" else (1, slice(None), 5)] = True
    assert torch.equal(got[~touched], want[~touched])


@moments
def test_empty(name: str) -> None:
    OPS[name](*([] for _ in range(2 if name != "factored_moment_" else 3)), 0.9, 1e-8)
    for shape, keep in itertools.product(EMPTY, (True, False)):
        tensors = [*state(name, shape), torch.empty(shape)]
        got = updated(OPS[name], tensors, 0.9, 1e-8, "outside", keep)
        peer = updated(OPS[name].reference, tensors, 0.9, 1e-8, "outside", keep)
        for g, p in zip(got, peer, strict=True):  # means over nothing are NaN
            torch.testing.assert_close(g, p, rtol=0, atol=0, equal_nan=True)


@norms
@pytest.mark.parametrize("shape", EMPTY)
def test_norm_of_nothing(name: str, shape: tuple[int, ...]) -> None:
    assert OPS[name](torch.empty(shape)).shape == shape
