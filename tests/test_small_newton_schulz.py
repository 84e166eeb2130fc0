"""The CPU kernel of small_newton_schulz against the definition in extended precision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from orthonorm._library import has_kernel
from orthonorm.ops import small_newton_schulz
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not has_kernel("small_newton_schulz", "CPU"), reason="the compiled library is not loaded"
)

MUON = [3.4445, -4.7750, 2.0315] * 5
CUBIC = [1.5, -0.5, 0.0] * 6
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    *[(1, 1), (1, 128), (128, 1), (2, 3), (7, 5), (15, 16), (17, 33), (33, 17), (32, 32)],
    *[(50, 50), (64, 31), (100, 9), (127, 128), (128, 127), (128, 128)],
    *[(1, 5000), (16385, 1), (2, 301), (2000, 8), (90, 182)],
]
ISAS = ["portable", "avx2", "avx512", "avx512bf16", "amx"]


def exact(
    X: Tensor,
    coefficients: list[float],
    scale: bool = True,
    eps: float = 0.0,
    safety: float = 1.0,
    norms: Tensor | None = None,
) -> Tensor:
    """The definition in long double, rounded to float64."""
    x = X.double().numpy().astype(np.longdouble)
    if scale:
        own = np.sqrt((x * x).sum((-2, -1), keepdims=True))
        x = x / np.maximum(own if norms is None else norms.numpy().reshape(own.shape), eps)
    x = x / np.longdouble(safety)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-2, -1) if tall else x
    for a, b, c in zip(*(coefficients[i::3] for i in range(3)), strict=True):
        A = x @ x.swapaxes(-2, -1)
        x = a * x + (b * A + c * (A @ A)) @ x
    return torch.from_numpy((x.swapaxes(-2, -1) if tall else x).astype(np.float64))


def float64(X: Tensor, coefficients: list[float] = MUON) -> Tensor:
    """The goal where float64 is exact enough, quickly."""
    return small_newton_schulz.reference([X.double()], coefficients, torch.float64)[0]


def error(Y: Tensor, Z: Tensor) -> float:
    return float((Y.double() - Z).norm() / Z.norm())


def same(Y: Tensor, Z: Tensor) -> bool:
    return Y.shape == Z.shape and Y.dtype == Z.dtype and bool((Y == Z).all())


def assert_accurate(X: Tensor, dtype: torch.dtype, coefficients: list[float]) -> None:
    """err(kernel) <= 2 err(same arithmetic in torch), or the last bits: one per iteration."""
    goal = exact(X, coefficients) if dtype == torch.float64 else float64(X, coefficients)
    Y = small_newton_schulz([X], coefficients, dtype)[0]
    assert Y.dtype == X.dtype and Y.shape == X.shape and Y.is_contiguous()
    yardstick = error(small_newton_schulz.reference([X], coefficients, dtype)[0], goal)
    bits = max(torch.finfo(dtype).eps, torch.finfo(X.dtype).eps) * len(coefficients) / 3
    if dtype in (torch.bfloat16, torch.float16):
        bits = torch.finfo(dtype).eps  # one matrix of 1 x 1 may be lucky, no more
    assert error(Y, goal) <= 2 * yardstick + bits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_error(shape: tuple[int, int], dtype: torch.dtype, kind: torch.dtype) -> None:
    torch.manual_seed(1)
    if max(shape) > 100 and torch.float32 not in (dtype, kind):
        pytest.skip("the small shapes have every pair of dtypes")
    count = 1 if min(shape) > 64 else 8
    X = torch.randn(count, *shape, dtype=torch.float64).to(kind)
    assert_accurate(X, dtype, MUON)
    if max(shape) < 64:
        assert_accurate(X, dtype, CUBIC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [8, 32, 64, 128])
def test_error_below_the_torch_optimizer(n: int, dtype: torch.dtype) -> None:
    """No worse than torch.optim.Muon's own bfloat16 function."""
    muon = pytest.importorskip("torch.optim._muon")
    torch.manual_seed(2)
    X = torch.randn(2000 // n, n, n)
    goal = float64(X)
    theirs = torch.stack(
        [muon._zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7) for x in X]
    )
    assert error(small_newton_schulz([X], MUON, dtype)[0], goal) <= error(theirs, goal)


@pytest.mark.parametrize("shape", [(33, 17), (20, 47), (40, 40), (1, 300), (200, 1)], ids=str)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_strides_do_not_matter(
    shape: tuple[int, int], kind: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    m, n = shape
    views = [
        torch.randn(2, 3, n, m).to(kind).mT,
        torch.randn(2, 3, 2 * m, 3 * n).to(kind)[..., ::2, 1::3],
        torch.randn(2, 3, m + 5, n + 5).to(kind)[..., 2:-3, 1:-4],
        torch.randn(m, 2, n, 3).to(kind).permute(1, 3, 0, 2),
        torch.randn(4, 6, m, n).to(kind)[::2, ::2],
        torch.randn(1, 1, m, n).to(kind).expand(2, 3, m, n),
        torch.randn(2, 3, m, 1).to(kind).expand(2, 3, m, n),
        torch.randn(m, n).to(kind),
    ]
    for X in views:
        before = X.clone()
        Y = small_newton_schulz([X], MUON, dtype)[0]
        assert same(Y, small_newton_schulz([X.contiguous()], MUON, dtype)[0])
        assert Y.is_contiguous() and same(X, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_does_not_matter(dtype: torch.dtype) -> None:
    """polar(2^k X) == polar(X) bit for bit wherever 2^k X is exact, subnormal numbers included."""
    torch.manual_seed(4)
    for shape in [(3, 3), (33, 17), (48, 64), (128, 128), (1, 5000), (300, 1), (2, 301)]:
        for kind, exponents in {
            torch.float32: [-142, -130, -126, -60, -1, 1, 60, 124],
            torch.float64: [-1060, -1030, -1022, -500, 1, 500, 1000, 1020],
            torch.bfloat16: [-127, -60, 1, 60, 124],
            torch.float16: [-18, -10, 1, 12],
        }.items():
            X = (torch.randint(-100, 101, shape) / 64).to(kind)
            Y = small_newton_schulz([X], MUON, dtype)[0]
            for k in exponents:
                scaled = torch.from_numpy(np.ldexp(X.double().numpy(), k)).to(kind)
                assert (np.ldexp(scaled.double().numpy(), -k) == X.double().numpy()).all()  # exact
                assert same(small_newton_schulz([scaled], MUON, dtype)[0], Y), (shape, kind, k)


@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1e36])
def test_extreme_scales(factor: float) -> None:
    torch.manual_seed(5)
    assert_accurate(torch.randn(9, 31) * factor, torch.float32, MUON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_alone_in_a_batch_and_in_a_list(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    X = [torch.randn(*s) for s in [(3, 5, 16, 16), (40, 33, 9), (2, 128, 100), (7, 7), (1, 64, 64)]]
    X[1] = X[1].double()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(small_newton_schulz(X, MUON, dtype))
    finally:
        torch.set_num_threads(threads)
    for together, other, third, x in zip(*results, X, strict=True):
        assert same(together, other) and same(together, third)
        assert same(together, small_newton_schulz([x], MUON, dtype)[0])
        matrices = x.reshape(-1, *x.shape[-2:])
        alone = [small_newton_schulz([one], MUON, dtype)[0] for one in matrices]
        assert same(together, torch.stack(alone).view(x.shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_non_finite_stays_in_its_matrix(dtype: torch.dtype, bad: float) -> None:
    torch.manual_seed(7)
    X = torch.randn(6, 17, 18)
    clean = small_newton_schulz([X], MUON, dtype)[0]
    X[2, 3, 4] = bad
    Y = small_newton_schulz([X], MUON, dtype)[0]
    others = [0, 1, 3, 4, 5]
    assert same(Y[others], clean[others]) and not Y[2].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_zero_and_empty(dtype: torch.dtype, kind: torch.dtype) -> None:
    X = [torch.zeros(3, 17, 5), torch.zeros(0, 4, 4), torch.zeros(2, 0, 4), torch.zeros(2, 4, 0)]
    X = [x.to(kind) for x in X]
    for eps in (0.0, 1e-7):
        for x, y in zip(X, small_newton_schulz(X, MUON, dtype, True, eps), strict=True):
            assert same(x, y)
    assert small_newton_schulz([], MUON, dtype) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_eps_safety_scale(dtype: torch.dtype) -> None:
    """Each argument against the reference, and norms that are the matrices' own change nothing."""
    torch.manual_seed(8)
    X = [torch.randn(2, 3, 12, 20), torch.randn(31, 7), torch.randn(4, 5, 5).double()]
    norms = torch.cat([x.double().norm(dim=(-2, -1)).reshape(-1) for x in X])
    cases: list[dict[str, Any]] = [
        {"norms": norms},
        {"norms": norms * 2},
        {"norms": norms.repeat_interleave(2)[::2]},
        {"norms": norms * 0.5, "eps": 4.0},
        {"eps": 30.0},
        {"safety": 1.05},
        {"scale": False, "safety": 40.0},
        {"scale": False, "safety": 40.0, "norms": norms},
    ]
    for arguments in cases:
        ours = small_newton_schulz(X, MUON, dtype, **arguments)
        theirs = small_newton_schulz.reference(X, MUON, dtype, **arguments)
        first = 0
        for y, z, x in zip(ours, theirs, X, strict=True):
            own = dict(arguments)
            if "norms" in own:
                count = x[..., 0, 0].numel()
                own["norms"], first = own["norms"][first : first + count], first + count
            goal = exact(x, MUON, **own)
            bits = 5 * max(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps)
            assert error(y, goal) <= 2 * error(z, goal) + bits, arguments
    zero = small_newton_schulz(X, MUON, dtype, norms=torch.zeros_like(norms))
    assert all(same(y, torch.zeros_like(y)) for y in zero)


def test_one_wrong_norm_reaches_one_matrix() -> None:
    X = torch.randn(5, 9, 9)
    norms = X.double().norm(dim=(-2, -1))
    norms[3] *= 2
    plain, Y = (small_newton_schulz([X], MUON, torch.float32, norms=n)[0] for n in (None, norms))
    assert [same(y, z) for y, z in zip(Y, plain, strict=True)] == [True, True, True, False, True]


def test_mixed_list() -> None:
    torch.manual_seed(9)
    X = [torch.randn(n, m).to(FLOATS[i % 4]) for i, (n, m) in enumerate(SHAPES * 3)]
    for x, y in zip(X, small_newton_schulz(X, MUON, torch.float32), strict=True):
        assert same(y, small_newton_schulz([x], MUON, torch.float32)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op([torch.ones(129, 128)], MUON, torch.float32), "at most 128"),
        (lambda op: op([torch.ones(3)], MUON, torch.float32), "dim"),
        (lambda op: op([torch.ones(3, 3)], MUON[:4], torch.float32), r"\(a, b, c\)"),
        (lambda op: op([torch.ones(3, 3)], MUON, torch.int32), "dtype"),
        (lambda op: op([torch.ones(3, 3).int()], MUON, torch.float32), "X"),
        (
            lambda op: op([torch.ones(3, 3)], MUON, torch.float32, norms=torch.ones(2).double()),
            "norms",
        ),
    ],
)
def test_refusals(call: Callable[[Any], object], message: str) -> None:
    """In Python before dispatch, and in the kernel for callers of the overload."""
    with pytest.raises((ValueError, TypeError), match=message):
        call(small_newton_schulz)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(small_newton_schulz.overload)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """The tests of values again, in a process that may use only `isa`."""
    if os.environ.get("ORTHONORM_ISA"):
        pytest.skip("already restricted")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        + ["-k", "(test_error and (33 or 128-1 or 50)) or strides or scale_does or alone"],
        env={**os.environ, "ORTHONORM_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
