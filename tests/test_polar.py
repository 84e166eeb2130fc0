"""polar: bands, accuracy, equivariance, any finite matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orthonorm.orthogonalize as k1
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthonorm import polar
from orthonorm._library import LOADED
from orthonorm.coefficients import Coefficients, image, resolve
from orthonorm.ops import newton_schulz
from polar_judge import (
    DTYPES,
    SETS,
    Judge,
    hold,
    matrix,
    restarts_of,
)
from torch import Tensor


# ---- bands ---------------------------------------------------------------------------------------
@SETS
def test_band(c: Coefficients) -> None:
    """Singular values lie in the image of the input's, up to the plain error (Weyl)."""
    for m, n in ((40, 160), (90, 30)):
        X = matrix("log 1e-3", m, n).float()
        judge = Judge(X, c)
        low, high = image(c.steps(), *torch.linalg.svdvals(judge.input)[[-1, 0]].tolist())
        for form in ("direct", "gram"):
            for name, dtype in DTYPES.items():
                if name not in c.safe_dtypes(form):  # type: ignore[arg-type]
                    with pytest.raises(ValueError):
                        polar(X, c, method=form, precision=name)
                    continue
                restarts = restarts_of(c, name) if form == "gram" else None
                Q = polar(X.double(), c, method=form, precision=name)
                off = 2 * torch.linalg.matrix_norm(judge.plain(dtype, restarts), 2).item()
                s = torch.linalg.svdvals(Q)
                assert low - off <= s[-1].item(), (form, name, m, n)
                assert s[0].item() <= high + off, (form, name, m, n)


@SETS
def test_rank_one_keeps_its_direction(c: Coefficients) -> None:
    """No set reverses or loses u v^T: cosine > 0.6, and in half precision, where what rounding adds
    to a rank-1 matrix is amplified by f'(0) = 100 to 8e4, the part along u v^T is f(1)."""
    if c.name == "aol_flipping":
        return
    g = torch.Generator().manual_seed(0)
    inputs = [torch.ones(8, 127), -torch.ones(150, 140)]
    for m, n in ((5, 1), (1, 9), (40, 90), (200, 50)):
        inputs.append(torch.randn(m, 1, generator=g) @ torch.randn(1, n, generator=g))
    judges = [Judge(X, c) for X in inputs]
    for form in ("direct", "gram"):
        for name in c.safe_dtypes(form):  # type: ignore[arg-type]
            restarts, dtype = restarts_of(c, name) if form == "gram" else None, DTYPES[name]
            results = polar(inputs, c, method=form, precision=name)
            errors, plain = [], [torch.finfo(dtype).eps]
            for X, Q, judge in zip(inputs, results, judges, strict=True):
                if name in ("float32", "float64"):
                    cosine = torch.nn.functional.cosine_similarity(Q.flatten(), X.flatten(), dim=0)
                    assert cosine > 0.6, (form, name, tuple(X.shape))
                along = judge.exact / judge.exact.norm()
                errors.append((judge.off(Q) * along).sum().abs().item())
                plain.append(torch.linalg.matrix_norm(judge.plain(dtype, restarts), 2).item())
                plain[0] = max(plain[0], torch.finfo(Q.dtype).eps)
            assert max(errors) <= 2 * max(plain), (form, name)


@pytest.mark.parametrize("best", ["other", "avx512bf16", "amx"])
@pytest.mark.parametrize("wish", [None, "AMX", "portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_rates_are_those_of_the_kernels(
    best: str, wish: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ORTHONORM_ISA may only lower the instruction set, and other names leave it, as in isa.h."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: best != "other")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: best == "amx")
    monkeypatch.delenv("ORTHONORM_ISA", raising=False)
    if wish is not None:
        monkeypatch.setenv("ORTHONORM_ISA", wish)
    rows = ["other", "avx512bf16", "amx"]  # from the lowest
    low = wish in ("portable", "avx2", "avx512")
    lowered = 0 if low else rows.index(wish) if wish in rows else len(rows)
    assert k1.processor.__wrapped__() == rows[min(lowered, rows.index(best))]


def test_auto_leaves_bfloat16_to_the_sets_it_is_safe_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to bfloat16 takes polar_express_raw above 1: 1.47 for a rank-1 matrix, not 1.12."""
    monkeypatch.setattr(k1, "processor", lambda: "avx512bf16")
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(300, 300, generator=g)]
    inputs += [torch.randn(300, 1, generator=g) @ torch.randn(1, 300, generator=g) for _ in "four"]
    for name in ("polar_express_raw", "cans", "inverse_root"):
        c = resolve(name)
        off, bound = 0.0, 0.0  # of all together: the error of a rank-1 matrix is one number's luck
        for X, Q in zip(inputs, polar(inputs, name), strict=True):
            judge = Judge(X, c)
            allowed = judge.bound(torch.float32)
            assert torch.linalg.matrix_norm(Q.double(), 2) <= c.image(0.0)[1] + allowed
            off += judge.off(Q).square().sum().item()
            bound += allowed**2
        assert off <= bound
        assert polar(inputs[0].double(), name).dtype == torch.float64


# ---- accuracy ------------------------------------------------------------------------------------
SPECTRA = ("gaussian", "log 1e-2", "log 1e-5", "rank n/2", "two spikes", "power law",
           "condition 1e-6")  # fmt: skip


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 384), (256, 256), (300, 140), (60, 100)], ids=str)
def test_error_against_float64(kind: str, shape: tuple[int, int]) -> None:
    """Both forms in every dtype they are safe in, each against the plain iteration of its form."""
    X = matrix(kind, *shape).float()
    for name in ("polar_express", "keller", "cubic5"):
        c = resolve(name)
        judge = Judge(X, c)
        for p, dtype in DTYPES.items():
            if p in ("float64", "float16") and X.numel() > 40000:
                continue  # longdouble and, on most CPUs, float16 products take seconds
            judge.holds(polar(X.double(), name, method="direct", precision=p), dtype)
            if p == "bfloat16":  # the Gram form that "auto" may take: its chain is float32
                numbers = [x for triple in c.steps() for x in triple]
                restarts = restarts_of(c, "float32")
                (Q,) = newton_schulz([X], numbers, list(restarts), "gram", p, safety=c.safety)
                judge.holds(Q, dtype)
            if p in c.safe_dtypes("gram"):
                restarts = restarts_of(c, p)
                Q = polar(X.double(), name, method="gram", precision=p)
                if p == "float16":  # chaotic on these spectra: no worse than direct bfloat16
                    judge.holds(Q, torch.bfloat16)
                else:
                    judge.holds(Q, dtype, restarts)
                if p == "float32":  # what coefficients.LIMITS says of conditions up to 1e7
                    assert judge.off(Q).norm() <= 2e-3 * judge.exact.norm()


def test_precision_auto_and_full_keep_their_word() -> None:
    c = resolve("polar_express")
    for m, n in ((30, 50), (140, 300)):
        X = matrix("log 1e-2", m, n)  # (140, 300): the Gram form, with float32's restarts
        for precision in ("auto", "full"):
            Q = polar(X, precision=precision)
            assert Q.dtype == torch.float64
            judge = Judge(X, c)
            bounds = [judge.bound(torch.float64, r) for r in (None, restarts_of(c, "float32"))]
            assert judge.off(Q, torch.float64).norm() <= max(bounds)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            Q = polar(X.to(dtype), precision="full", method="direct")
            assert Q.dtype == dtype
            Judge(X.to(dtype), c).holds(Q, torch.float32)
            # "auto" on a CPU is float32 or bfloat16, never coarser
            Q = polar(X.to(dtype))
            assert Q.dtype == dtype
            Judge(X.to(dtype), c).holds(Q, torch.bfloat16)


# ---- equivariance --------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_transpose(form: str, precision: str) -> None:
    if (form, precision) == ("gram", "bfloat16"):
        return
    c, dtype = resolve("keller"), DTYPES[precision]
    restarts = restarts_of(c, precision) if form == "gram" else None
    for m, n in ((150, 150), (40, 200), (50, 50), (7, 3)):
        X = matrix("log 1e-2", m, n).float()
        a, b = (polar(x, c, method=form, precision=precision) for x in (X, X.mT))
        allowed = Judge(X, c).bound(dtype, restarts) + Judge(X.mT, c).bound(dtype, restarts)
        few = 8 * torch.finfo(torch.float32).eps * a.norm().item()
        assert (a - b.mT).norm().item() <= allowed + few


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 3, 33, 20), (3, 60, 200)], ids=str)
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_batch_list_and_loop(shape: tuple[int, ...], form: str) -> None:
    """A list is bit for bit its members; so is a batch where kernels serve the words."""
    c = resolve("polar_express")
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    members = list(X.flatten(0, -3))
    for precision in ("float32", "float64"):
        loop = [polar(x, method=form, precision=precision) for x in members]
        for mixed in (members, [torch.ones(5, 4), *members, torch.ones(300, 2)]):
            together = polar(mixed, method=form, precision=precision)
            together = together if len(mixed) == len(loop) else together[1:-1]
            assert all(torch.equal(a, b) for a, b in zip(together, loop, strict=True))
        batch = polar(X, method=form, precision=precision)
        assert batch.shape == X.shape and batch.is_contiguous()
        small = k1.fits(*shape[-2:]) and form == "direct"
        words = ("small_newton_schulz",) if small else ("gram", "symmetric_update", "apply")
        exact = all((word, "CPU") in LOADED.served for word in words)
        restarts = restarts_of(c, precision) if form == "gram" else None
        for x, a, b in zip(members, batch.flatten(0, -3), loop, strict=True):
            assert torch.equal(a, b) or not exact
            Judge(x, c).holds(a, DTYPES[precision], restarts)


def coarse(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> Tensor:
    """Numbers of few bits between 2^-4 and 2, so that every power of two of them is exact."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x.sign() * x.abs().clamp(0.07, 1.9)
    return ((x * 2**bits).round() / 2**bits).to(dtype)


EXPONENTS = {
    "float32": (7, (-140, -120, -60, -1, 60, 120, 127)),
    "float64": (7, (-1060, -1022, -700, -1, 700, 1020, 1021, 1022, 1023)),
    "bfloat16": (6, (-120, -60, 60, 120)),
    "float16": (6, (-16, -8, 8, 14)),
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", ["frobenius", "schatten4", "aol"])
def test_scale_invariance(name: str, scale: str) -> None:
    """polar(2^k X) == polar(X), bit for bit, denormals included."""
    bits, exponents = EXPONENTS[name]
    for shape in ((6, 9), (2, 30, 20), (140, 30), (150, 150)):
        X = coarse(shape, bits, DTYPES[name])
        for form in ("auto", "gram"):
            options: dict[str, Any] = dict(method=form, scale=scale)
            plain = polar(X, **options)
            for k in exponents:
                Y = X.double() * 2.0 ** (k // 2) * 2.0 ** (k - k // 2)
                assert torch.equal(Y / 2.0 ** (k // 2) / 2.0 ** (k - k // 2), X.double())
                assert Y.to(X.dtype).isfinite().all()
                assert torch.equal(polar(Y.to(X.dtype), **options), plain), (shape, form, k)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e36])
def test_extreme_scales(scale: float) -> None:
    for shape in ((9, 6), (40, 200), (130, 130)):
        X = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
        Q = polar(X, method="direct", precision="float32")
        Judge(X, resolve("polar_express")).holds(Q, torch.float32)


# ---- any input -----------------------------------------------------------------------------------
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
SHORT = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def inputs(draw: Callable[[Any], Any]) -> Tensor:
    """Integers with many zeros and ties, times powers of ten by row and column, in any dtype."""
    m, n = draw(shapes)
    entries = draw(st.lists(st.integers(-3, 3), min_size=m * n, max_size=m * n))
    X = torch.tensor(entries, dtype=torch.float64).view(m, n)
    if draw(st.booleans()):
        X = X + 1e-3 * matrix("gaussian", m, n, draw(st.integers(0, 99)))
    rows = draw(st.lists(st.integers(-6, 0), min_size=m, max_size=m))
    X = (
        X
        * 10.0 ** torch.tensor(rows, dtype=torch.float64)[:, None]
        * 2.0 ** draw(st.integers(-90, 90))
    )
    return X.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))


def rotated(X: Tensor, seed: int) -> Tensor:
    m, n = X.shape
    U, V = matrix("gaussian", m, m, 2 * seed), matrix("gaussian", n, n, 2 * seed + 1)
    return (torch.linalg.qr(U)[0] @ X.double() @ torch.linalg.qr(V)[0]).to(X.dtype)


@SHORT
@given(inputs(), st.sampled_from(["polar_express", "keller", "cubic5"]))
def test_any_finite_matrix(X: Tensor, name: str) -> None:
    c = resolve(name)
    Q = polar(X, name)
    assert Q.isfinite().all() and Q.shape == X.shape and Q.dtype == X.dtype
    if not X.any():
        assert not Q.any()
        return
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32
    judge = Judge(X, c)
    if X.numel() >= 100:
        return judge.holds(Q, dtype)
    # Plain torch may be exact by luck on few elements: X is judged beside rotated ones, of the same
    # singular values and another rounding, and alone against the worst of them.
    family = [(judge, Q)]
    for x in (rotated(X, seed) for seed in range(39)):
        family.append((Judge(x, c), polar(x, name)))
    hold(family, dtype)
    ulp = 4 * torch.finfo(dtype).eps * judge.exact.norm().item()
    out = torch.finfo(Q.dtype).eps * judge.exact.norm().item()
    worst = max(j.bound(dtype) for j, _ in family)
    assert judge.off(Q, dtype).norm().item() <= worst + ulp + out
