"""The torch-free formulas of `csrc/*.h` on NumPy arrays, each written here a second time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pybind11
import pytest
import torch
from orthonorm.ops.rounding import places, stochastic

ROOT = Path(__file__).resolve().parent.parent
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
SCALES = pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])


@pytest.fixture(scope="module")
def formulas(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("formulas") / "formulas_numpy.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}"]
    includes.append(f"-isystem{sysconfig.get_paths()['include']}")
    source = str(ROOT / "csrc" / "tests" / "formulas_numpy.cpp")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    command = [os.environ.get("CXX", "g++"), *flags, *includes, source, "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    spec = importlib.util.spec_from_file_location("formulas_numpy", out)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(dtype: Any, scale: float, *squares: bool) -> list[np.ndarray]:
    """Normal numbers times scale; where True, squares of such."""
    random = np.random.default_rng(0)
    made = [scale * random.standard_normal((40, 50)) for _ in squares]
    return [(x * x if s else x).astype(dtype) for x, s in zip(made, squares, strict=True)]


def near(got: np.ndarray, want: np.ndarray, terms: np.ndarray, roundings: int) -> None:
    """At most so many roundings of what is added."""
    unit = np.finfo(got.dtype).eps / 2
    assert got.dtype in (np.float32, np.float64)
    assert (np.abs(got.astype(want.dtype) - want) <= roundings * unit * np.abs(terms)).all()


def wide(*given: np.ndarray) -> list[np.ndarray]:
    return [x.astype(np.longdouble) for x in given]


@DTYPES
@SCALES
def test_rotated_adam(formulas: Any, dtype: Any, scale: float) -> None:
    m, v, x = arrays(dtype, scale, False, True, False)
    eps = 0.3 * scale
    got = formulas.rotated_adam(m, v, x, beta1=0.9, beta2=0.99, eps=eps, scale=0.7)
    M, V, X = wide(m, v, x)
    terms = np.abs(0.9 * M) + np.abs(0.1 * X)
    M, V = 0.9 * M + (1 - 0.9) * X, 0.99 * V + (1 - 0.99) * X**2
    near(got[0], M, terms, 5)
    near(got[1], V, V, 5)
    near(got[2], 0.7 * M / (np.sqrt(V) + eps), 0.7 * terms / (np.sqrt(V) + eps), 16)


@DTYPES
@SCALES
def test_elementwise_moment(formulas: Any, dtype: Any, scale: float) -> None:
    v, x = arrays(dtype, scale, True, False)
    eps = 0.3 * scale
    got = formulas.elementwise_moment(v, x, beta2=0.99, eps=eps, correction=7.1)
    V, X = wide(v, x)
    V = 0.99 * V + (1 - 0.99) * X**2
    quotient = X / (7.1 * np.sqrt(V) + eps)
    near(got[0], V, V, 5)
    near(got[1], quotient, quotient, 12)


@DTYPES
@pytest.mark.parametrize("decay_first", [True, False])
@pytest.mark.parametrize("correct_eps", [True, False])
def test_adamw_step(formulas: Any, dtype: Any, decay_first: bool, correct_eps: bool) -> None:
    w, g, m, v = arrays(dtype, 1.0, False, False, False, True)
    got = formulas.adamw_step(
        w, g, m, v, t=7, lr=0.1, beta1=0.9, beta2=0.95, eps=0.5, weight_decay=0.3,
        decay_first=decay_first, correct_eps=correct_eps, grad_scale=4.0,
    )  # fmt: skip
    W, G, M, V = wide(w, g, m, v)
    G = G / 4
    M, V = 0.9 * M + (1 - 0.9) * G, 0.95 * V + (1 - 0.95) * G**2
    c1, c2 = 1 - 0.9**7, 1 - 0.95**7
    root = np.sqrt(V / c2) + 0.5 if correct_eps else (np.sqrt(V) + 0.5) / np.sqrt(c2)
    step, kept = 0.1 * M / c1 / root, 1 - 0.1 * 0.3
    new = kept * W - step if decay_first else kept * (W - step)
    near(got[0], new, np.abs(W) + np.abs(step) + 0.1 / root, 24)
    near(got[2], M, np.abs(M) + np.abs(G), 5)
    near(got[3], V, V, 5)
    assert (got[1] == g).all()


@DTYPES
def test_decayed_update(formulas: Any, dtype: Any) -> None:
    w, u = arrays(dtype, 1.0, False, False)
    new, same = formulas.decayed_update(w, u, lr=0.1, weight_decay=0.3, factor=2.0)
    W, U = wide(w, u)
    near(new, (1 - 0.03) * W - 0.2 * U, np.abs(W) + np.abs(U), 4)
    assert (same == u).all()


@DTYPES
def test_update_of_halves(formulas: Any, dtype: Any) -> None:
    """As of float32 weights, to the bit; the halves put together by integers here."""
    w, u = arrays(dtype, 1.0, False, False)
    high = (w.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(dtype)
    low = np.arange(w.size).reshape(w.shape).astype(dtype) * 29 - 29000
    before, zero = together(high, low), np.zeros_like(w)
    new, _, rest = formulas.update_halves(high, u, low, lr=0.1, weight_decay=0.3, factor=2.0)
    whole, _ = formulas.decayed_update(
        before.astype(dtype), u, lr=0.1, weight_decay=0.3, factor=2.0
    )
    assert (together(new, rest) == whole.astype(np.float32)).all()
    assert (new.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all()
    same, _, kept = formulas.update_halves(high, zero, low, lr=0.0, weight_decay=0.0, factor=1.0)
    assert (same == high).all() and (kept == low).all()


@DTYPES
def test_adamw_of_halves(formulas: Any, dtype: Any) -> None:
    """As of float32 weights, to the bit; moments too."""
    w, g, m, v = arrays(dtype, 1.0, False, False, False, True)
    high = (w.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(dtype)
    low = np.arange(w.size).reshape(w.shape).astype(dtype) * 29 - 29000
    got = formulas.adamw_halves(high, g, m, v, low, t=3.0, lr=0.1, weight_decay=0.3)
    whole = formulas.adamw_step(
        together(high, low).astype(dtype), g, m, v, t=3.0, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
        weight_decay=0.3, decay_first=True, correct_eps=True, grad_scale=1.0,
    )  # fmt: skip
    assert (together(got[0], got[4]) == whole[0].astype(np.float32)).all()
    assert all((got[i] == whole[i]).all() for i in (1, 2, 3))


def together(high: Any, low: Any) -> Any:
    bits = high.astype(np.float32).view(np.int32) + low.astype(np.int32)
    return bits.view(np.float32)


@DTYPES
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_prologue(formulas: Any, dtype: Any, nesterov: bool) -> None:
    g, b = arrays(dtype, 1.0, False, False)
    settings = dict(mu=0.95, nesterov=nesterov, grad_scale=4.0)
    update, momentum = formulas.muon_prologue(g, b, **settings, found_inf=0.0)
    same, kept = formulas.muon_prologue(g, b, **settings, found_inf=1.0)
    assert (same == update).all() and (kept == b).all()
    G, B = wide(g, b)
    G = G / 4
    terms, B = np.abs(G) + np.abs(B), 0.95 * B + (1 - 0.95) * G
    near(momentum, B, terms, 4)
    near(update, 0.95 * B + (1 - 0.95) * G if nesterov else B, terms, 8)


def test_zero_over_zero_is_zero(formulas: Any) -> None:
    zero = np.zeros(3, np.float32)
    moved = formulas.rotated_adam(zero, zero, zero, beta1=0.9, beta2=0.9, eps=0.0, scale=1.0)
    assert all((x == 0).all() for x in moved)
    assert (formulas.elementwise_moment(zero, zero, 0.9, 0.0, 1.0)[1] == 0).all()


@pytest.mark.parametrize("square", [0.0, 0.04, 2.25])
def test_eps_placements(formulas: Any, square: float) -> None:
    root, at = square**0.5, formulas.EpsAt
    wanted = {at.outside: root + 0.5, at.inside: (square + 0.5) ** 0.5, at.clamp: max(root, 0.5)}
    for place, want in wanted.items():
        assert formulas.denominator(square, 0.5, place) == pytest.approx(want, rel=1e-15)
        norm = formulas.divisor(root, 0.5, place)
        assert norm == pytest.approx(want, rel=1e-15)
    assert formulas.decayed(2.0, square, 0.9) == pytest.approx(1.8 + 0.1 * square, rel=1e-15)
    assert formulas.norm_ratio(4.0, 9.0) == pytest.approx(2 / 3) and not formulas.norm_ratio(1.0, 0)


def test_stochastic_rounding_draws_the_definitions_bits(formulas: Any) -> None:
    (x,) = arrays(np.float32, 1.0, False)
    for seed in (0, 1, -1, 2**40 + 3):
        (got,) = formulas.stochastic(x, seed)
        where = places(torch.from_numpy(x))
        want = stochastic(torch.from_numpy(x), torch.tensor(seed), where).numpy()
        assert (got == want).all() and (got != x).any()


def test_other_dtypes_and_sizes_are_refused(formulas: Any) -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(TypeError):
        formulas.decayed_update(x, x.astype(np.float64), 0.1, 0.0, 1.0)
    with pytest.raises(ValueError, match="one size"):
        formulas.decayed_update(x, x[:2], 0.1, 0.0, 1.0)
