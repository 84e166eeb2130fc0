"""The public K1 functions: polar, odd_polynomial, polar_exact.

What a result is held against is computed here, in float64, from the triples alone (for float64
results in NumPy's longdouble). What rounding may add is measured, not chosen: err(ours in p) <= 2
err(plain torch in p), the plain iteration being that of torch.optim.Muon, in the same form and with
the same restarts, started from the input that float64 scaled and rounded once (for float64 results
from X / X.norm(): the polynomials multiply an error of the norm by up to 150).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import orthonorm
import orthonorm.orthogonalize as k1
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthonorm import odd_polynomial, polar
from orthonorm._library import LOADED
from orthonorm.coefficients import COEFFICIENTS, Coefficients, image, resolve
from torch import Tensor

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
SETS = pytest.mark.parametrize("c", COEFFICIENTS.values(), ids=lambda c: c.name)
Triples = Sequence[tuple[float, float, float]]


# ---- what is right, and what plain torch makes of it ---------------------------------------------
def scaled(X: Any, c: Coefficients, scale: str = "", eps: float = 0.0) -> Any:
    """X (an array, float64 or longdouble) over the norm that `scale` names."""
    scale, A = scale or c.prescale, X @ X.T
    if scale == "none":
        return X / c.safety
    if scale == "aol":
        size = np.sqrt(np.abs(A).sum(-1, keepdims=True))
    elif scale == "schatten4":
        size = np.sqrt(np.sqrt((A * A).sum()))
    else:
        size = np.sqrt((X * X).sum())
    return X / (np.maximum(size, eps or 5e-324) * c.safety)


def exact_direct(Y: Any, triples: Triples) -> Any:
    """Textbook, on the wide side, in the type of the array."""
    Y = Y if Y.shape[0] <= Y.shape[1] else Y.T
    for a, b, c in triples:
        A = Y @ Y.T
        Y = a * Y + (b * A + c * (A @ A)) @ Y
    return Y


def plain_direct(Y: Tensor, triples: Triples) -> Tensor:
    Y = Y if Y.shape[0] <= Y.shape[1] else Y.T
    for a, b, c in triples:
        A = Y @ Y.T
        Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
    return Y


def plain_gram(Y: Tensor, triples: Triples, restarts: Sequence[int]) -> Tensor:
    Y = Y if Y.shape[0] <= Y.shape[1] else Y.T
    identity = torch.eye(len(Y), dtype=Y.dtype)
    R, Q = Y @ Y.T, identity
    for t, (a, b, c) in enumerate(triples):
        if t in restarts:
            Y = Q @ Y
            R, Q = Y @ Y.T, identity
        Z = torch.addmm(R, R, R, beta=b, alpha=c)
        Q = torch.addmm(Q, Q, Z, beta=a)
        W = torch.addmm(R, R, Z, beta=a)
        R = torch.addmm(W, Z, W, beta=a)
    return Q @ Y


def extended() -> bool:
    return bool(np.finfo(np.longdouble).eps < 2e-19)


class Judge:
    """The exact result of one matrix, and the error of the plain iteration in any dtype."""

    def __init__(self, X: Tensor, c: Coefficients, scale: str = "", eps: float = 0.0) -> None:
        self.wide, self.triples = X.shape[0] <= X.shape[1], c.steps()
        array = X.detach().double().numpy()
        self._scaled: Callable[[Any], Any] = lambda t: scaled(array.astype(t), c, scale, eps)
        self.input = torch.from_numpy(self._scaled(np.float64))
        self.simple = self.input
        if (scale or c.prescale) == "frobenius":
            Y = torch.from_numpy(array)
            self.simple = Y / (Y.norm().clamp(min=eps or 5e-324) * c.safety)
        self.exact = torch.from_numpy(exact_direct(self.input.numpy(), self.triples))

    @cached_property
    def _longer(self) -> Any:
        return exact_direct(self._scaled(np.longdouble), self.triples)

    def off(self, Q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q - exact, on the wide side; longdouble where `dtype`, that of the iterates, needs it."""
        Q = Q if self.wide else Q.T
        if dtype == torch.float64 and extended():
            return torch.from_numpy((Q.numpy().astype(np.longdouble) - self._longer).astype(float))
        return Q.double() - self.exact

    def plain(self, dtype: torch.dtype, restarts: Sequence[int] | None = None) -> Tensor:
        """What the plain iteration in `dtype` is off by (Gram form if restarts are given)."""
        if dtype == torch.float64 and not extended():  # rounding is linear in eps
            return self.plain(torch.float32, restarts) * 2.0**-28
        Y = self.simple if dtype == torch.float64 else self.input.to(dtype)
        Q = plain_direct(Y, self.triples)
        Q = Q if restarts is None else plain_gram(Y, self.triples, restarts)
        return self.off(Q if self.wide else Q.T, dtype)

    def bound(self, dtype: torch.dtype, restarts: Sequence[int] | None = None) -> float:
        return 2 * self.plain(dtype, restarts).norm().item()

    def holds(self, Q: Tensor, dtype: torch.dtype, restarts: Sequence[int] | None = None) -> None:
        """The rule; on a few elements plain torch may be exact by luck, hence 4 ulp (test_ops)."""
        ulp = torch.finfo(dtype).eps * self.exact.norm().item()
        few = 4 * ulp if self.exact.numel() < 100 else 0.0
        out = torch.finfo(Q.dtype).eps * self.exact.norm().item()  # if the result is rounded again
        out = out if torch.finfo(Q.dtype).eps > torch.finfo(dtype).eps else 0.0
        assert Q.isfinite().all()
        assert self.off(Q, dtype).norm().item() <= self.bound(dtype, restarts) + few + out


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    rest = i / max(n - 1, 1)
    if kind == "two spikes":
        return torch.where(i < 2, 1.0, 10.0 ** (-4 - 3 * rest))
    return {
        "log 1e-2": 10.0 ** (-2 * rest),
        "log 1e-3": 10.0 ** (-3 * rest),
        "log 1e-5": 10.0 ** (-5 * rest),
        "rank n/2": (i < n // 2).double(),
        "power law": 1 / (1 + i),
        "condition 1e-6": torch.where(i < n - n // 4, 1.0, 1e-6),
        "condition 1e-12": torch.where(i < n - n // 4, 1.0, 1e-12),
        "one tiny": torch.where(i < n - 1, 1.0, 1e-6),
        "one large": torch.where(i < 1, 1.0, 1e-5),
        "clustered": torch.where(i < n // 2, 1.0, 1e-3) * (1 + 1e-9 * i),
        "flat": torch.ones(n, dtype=torch.float64),
    }[kind]


def matrix(kind: str, m: int, n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    """float64, with the singular values that `kind` names."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    if kind == "gaussian":
        return normal(m, n)
    k = min(m, n)
    U, V = torch.linalg.qr(normal(m, k)).Q, torch.linalg.qr(normal(n, k)).Q
    return U * spectrum(kind, k) @ V.mT


def restarts_of(c: Coefficients, dtype: str) -> tuple[int, ...]:
    return orthonorm.coefficients.default_restarts(c, dtype)


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


def test_auto_leaves_bfloat16_to_the_sets_it_is_safe_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to bfloat16 takes polar_express_raw above 1: 1.47 for a rank-1 matrix, not 1.12."""
    monkeypatch.setattr(k1, "_fast_bfloat16", lambda device: True)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(300, 300, generator=g)]
    inputs += [torch.randn(300, 1, generator=g) @ torch.randn(1, 300, generator=g) for _ in "four"]
    for name in ("polar_express_raw", "cans", "inverse_root"):
        c = resolve(name)
        for X, Q in zip(inputs, polar(inputs, name), strict=True):
            assert torch.linalg.matrix_norm(Q, 2) <= c.image(0.0)[1] + 1e-5
            Judge(X, c).holds(Q, torch.float32)
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
            if p in c.safe_dtypes("gram"):
                restarts = restarts_of(c, p)
                Q = polar(X.double(), name, method="gram", precision=p)
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
        small = max(shape[-2:]) <= k1.SMALL and form == "direct"
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


# ---- zero, non-finite, empty, views --------------------------------------------------------------
OPTIONS: list[dict[str, Any]] = [
    dict(method=form, precision=p, scale=scale)
    for form in ("direct", "gram", "auto")
    for p in ("auto", "full", "float16")
    for scale in ("frobenius", "schatten4", "aol", "none")
]


@pytest.mark.parametrize("o", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_zero_stays_zero_and_nonfinite_stays_inside(o: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    for m, n in ((6, 9), (150, 20)):
        X = torch.randn(4, m, n, generator=g) / 30
        X[1], X[1, -1, -1] = 0, -0.0
        clean = polar(X, **o)
        assert not clean[1].any()
        assert not polar(X[1], **o).any()
        assert clean.isfinite().all()
        for bad in (math.nan, math.inf, -math.inf):
            Y = X.clone()
            Y[2, 3, 4] = bad
            for Q in (polar(Y, **o), torch.stack(polar(list(Y), **o))):
                assert not Q[2].isfinite().all()
            Q = polar(Y, **o)
            assert all(torch.equal(Q[i], clean[i]) for i in (0, 1, 3))


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 200, 300), (3, 0, 2, 2)],
    ids=str,
)  # fmt: skip
def test_empty(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES.values():
        X = torch.zeros(shape, dtype=dtype)
        for Q in (polar(X), *polar([X, X]), odd_polynomial(X, [(1.5, -0.5, 0.0)])):
            assert Q.shape == X.shape and Q.dtype == dtype
        r = orthonorm.polar_exact(X)
        assert r.factor.shape == X.shape and r.factor.dtype == dtype
        assert all(t.shape == shape[:-2] for t in r[1:])
    assert polar([]) == []


@pytest.mark.parametrize("n", [1, 2, 7, 129, 1000])
@pytest.mark.parametrize("name", ["keller", "polar_express", "cubic5", "classic_cubic"])
def test_vectors_are_normalized(n: int, name: str) -> None:
    """A 1 x n or n x 1 matrix has one singular value, 1: it becomes f(1) x / |x|. One vector's error
    is luck, so ten are judged together."""
    c = resolve(name)
    vectors = torch.randn(10, n, generator=torch.Generator().manual_seed(n)).double()
    judges = [Judge(x[None], c) for x in vectors]
    for precision in ("float32", "float64"):
        dtype = DTYPES[precision]
        ulp = torch.finfo(dtype).eps * max(j.exact.norm().item() for j in judges)
        allowed = 2 * max(j.plain(dtype).norm().item() for j in judges) + 4 * ulp
        for X in (vectors[:, None], vectors[:, :, None], list(vectors[:, None])):
            results = polar(X, c, precision=precision)
            assert [q.shape for q in results] == [x.shape for x in X]
            for q, judge in zip(results, judges, strict=True):
                assert judge.off(q.view(1, n), dtype).norm().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_views_and_dtypes(dtype: torch.dtype) -> None:
    """Any strides; contiguous results in the dtype of X; X as it was."""
    c = resolve("keller")
    for m, n in ((12, 31), (90, 140)):
        base = torch.randn(2 * m, 3 * n, generator=torch.Generator().manual_seed(0)).to(dtype)
        views = {
            "sliced": base[3 : 3 + m, 5 : 5 + n],
            "strided": base[::2, ::3],
            "transposed": base[:n, :m].mT,
            "expanded": base[:1, :n].expand(m, n),
            "batch of views": base.view(2, m, 3 * n)[..., :n].transpose(0, 1)[:4].mT,
        }
        for what, X in views.items():
            before = base.clone()
            Q = polar(X, c, precision="float32", method="direct")
            assert Q.is_contiguous() and Q.dtype == dtype and Q.shape == X.shape, what
            assert torch.equal(base, before), what
            assert Q.data_ptr() != X.data_ptr()
            for q, x in zip(Q.view(-1, *Q.shape[-2:]), X.reshape(-1, *X.shape[-2:]), strict=True):
                Judge(x, c).holds(q, torch.float32)
    assert not polar(torch.nn.Parameter(torch.randn(3, 4)).detach()).requires_grad


# ---- options -------------------------------------------------------------------------------------
def test_eps_is_torch_clamp() -> None:
    """As torch.optim.Muon: X / max(|X|_F, eps); held against its own function in bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz as reference

    c, triple = resolve("keller"), (3.4445, -4.7750, 2.0315)
    for norm in (1e-9, 1e-7, 1e-3, 10.0):
        for m, n in ((40, 30), (60, 200)):
            X = matrix("log 1e-2", m, n)
            X = (X * norm / X.norm()).bfloat16().float()
            judge = Judge(X, c, eps=1e-7)
            Q = polar(X, triple, eps=1e-7, precision="bfloat16")
            theirs = judge.off(reference(X.bfloat16(), triple, 5, 1e-7))
            assert judge.off(Q).norm() <= 2 * theirs.norm()
            Q = polar(X, c, eps=1e-7, precision="full", method="direct")
            judge.holds(Q, torch.float32)
    assert polar(torch.full((3, 4), 1e-30), eps=1e-7).abs().max() < 1e-15


@pytest.mark.parametrize("scale", ["schatten4", "aol", "none"])
@pytest.mark.parametrize("name", ["polar_express", "polar_express_1.02", "aol"])
def test_scales(name: str, scale: str) -> None:
    c = resolve(name)
    for m, n in ((30, 90), (150, 60)):
        X = matrix("log 1e-2", m, n)
        X = (X / X.norm()).float() if scale == "none" else X.float()
        Q = polar(X, name, scale=scale, method="direct", precision="float32")
        Judge(X, c, scale).holds(Q, torch.float32)
        if scale == "none":
            same = polar(X, name, scale=scale, eps=1.0, method="direct", precision="float32")
            assert torch.equal(Q, same)
        else:
            tiny = X * (1e-9 / X.norm())
            Q = polar(tiny, name, scale=scale, eps=1e-7, method="direct", precision="float32")
            Judge(tiny, c, scale, eps=1e-7).holds(Q, torch.float32)


def test_scale_default_is_that_of_the_set() -> None:
    X = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(polar(X, "aol"), polar(X, "aol", scale="aol"))
    assert torch.equal(polar(X, "keller"), polar(X, "keller", scale="frobenius"))


@pytest.mark.parametrize("shape", [(60, 100), (60, 300)], ids=str)
def test_method_and_restarts_are_obeyed(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Gram form touches the long side in one Gram product per sweep, the direct form in all."""
    seen: list[tuple[int, ...]] = []
    gram = k1.gram
    monkeypatch.setattr(k1, "gram", lambda X: (seen.append(tuple(X.shape)), gram(X))[1])
    X, c = matrix("log 1e-2", *shape).float(), resolve("polar_express")
    results = {}
    for restarts in ((2,), (1, 3), (1, 2, 3, 4)):
        seen.clear()
        results[restarts] = polar(X, method="gram", restarts=restarts, precision="float32")
        assert seen == [shape] * (1 + len(restarts))
        Judge(X, c).holds(results[restarts], torch.float32, restarts)
    assert torch.equal(results[2,], polar(X, method="gram", precision="float32"))
    assert torch.equal(results[1, 3], polar(X, method="gram", restarts=[1, 3], precision="float32"))
    assert not torch.equal(results[2,], results[1, 3])
    seen.clear()
    Q = polar(X, method="direct", restarts=(2,), precision="float32")
    assert len(seen) == (0 if max(shape) <= k1.SMALL else 5)
    assert torch.equal(Q, polar(X, method="direct", precision="float32"))


def test_steps_and_custom_coefficients() -> None:
    X = matrix("log 1e-2", 40, 150).float()
    for name, steps in (("keller", 1), ("keller", 8), ("polar_express", 3), ("you6", 6)):
        judge = Judge(X, resolve(name, steps))
        assert len(judge.triples) == steps
        judge.holds(polar(X, name, steps=steps, method="direct", precision="full"), torch.float32)
    triple = (3.4445, -4.7750, 2.0315)
    want = polar(X, "keller")
    for same in (triple, list(triple), [triple] * 5, [list(triple)] * 5, (list(triple),) * 5):
        assert torch.equal(polar(X, same), want)
    assert torch.equal(polar(X, COEFFICIENTS["keller"]), want)
    assert torch.equal(polar(X, "polar_express_1.05"), polar(X, "polar_express"))


# ---- refusals ------------------------------------------------------------------------------------
@SETS
def test_unsafe_combinations_name_a_safe_one(c: Coefficients) -> None:
    X = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    for form in ("direct", "gram"):
        for p in DTYPES:
            if p in c.safe_dtypes(form):  # type: ignore[arg-type]
                continue
            with pytest.raises(ValueError) as caught:
                polar(X, c, method=form, precision=p)
            said = str(caught.value)
            assert p in said or c.name in said
            if "'polar_express'" in said:
                assert polar(X, "polar_express", method="direct", precision=p).isfinite().all()
            elif "restarts=(" in said:  # "store float16 in the Gram form (restarts=(2,))"
                inside = said.split("restarts=(")[1].split(")")[0]
                named = tuple(int(r) for r in inside.split(",") if r.strip())
                Q = polar(X, c, method=form, precision="float16", restarts=named)
                assert Q.isfinite().all()
                assert polar(X, c, method="direct", precision=p).isfinite().all()
            else:
                raise AssertionError(f"names nothing safe: {said}")


def test_gram_form_in_bfloat16_and_without_restarts_is_refused() -> None:
    X = torch.randn(6, 9)
    with pytest.raises(ValueError, match=r"store float16.*restarts=\(2,\).*direct.*got bfloat16"):
        polar(X, method="gram", precision="bfloat16")
    for p in ("float16", "float32", "auto", "full"):
        with pytest.raises(ValueError, match=r"restarts=\(2,\) or .*direct"):
            polar(X, method="gram", precision=p, restarts=())
    polar(X, "keller", method="gram", precision="float32", restarts=())
    with pytest.raises(ValueError, match="gram_condition"):
        polar(X, "keller", method="gram", precision="float16", restarts=())


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(coefficients="nope"), ValueError, "'nope'"),
    (dict(coefficients=5), TypeError, "int"),
    (dict(coefficients={}), TypeError, "dict"),
    (dict(coefficients=torch.ones(3)), TypeError, "Tensor"),
    (dict(coefficients=torch.ones(3).numpy()), TypeError, "ndarray"),
    (dict(coefficients=(1.5, -0.5)), ValueError, "-0.5"),
    (dict(coefficients=(math.nan, 0, 0)), ValueError, "nan"),
    (dict(coefficients=[]), ValueError, "triple"),
    (dict(coefficients=["abc"]), TypeError, "str"),
    (dict(steps=0), ValueError, "0"),
    (dict(steps=2.0), TypeError, "2.0"),
    (dict(steps=True), TypeError, "True"),
    (dict(coefficients="you6", steps=7), ValueError, "7"),
    (dict(method="triangle"), ValueError, "'triangle'"),
    (dict(method=None), ValueError, "None"),
    (dict(method=["gram"]), ValueError, "gram"),
    (dict(precision="bf16"), ValueError, "'bf16'"),
    (dict(precision=torch.float32), ValueError, "torch.float32"),
    (dict(scale="spectral"), ValueError, "'spectral'"),
    (dict(eps=-1.0), ValueError, "-1.0"),
    (dict(eps=math.nan), ValueError, "nan"),
    (dict(eps="1"), TypeError, "str"),
    (dict(eps=None), TypeError, "None"),
    (dict(restarts=2), TypeError, "2"),
    (dict(restarts=None), TypeError, "None"),
    (dict(restarts="never"), TypeError, "'never'"),
    (dict(restarts=(0,)), ValueError, "0"),
    (dict(restarts=(5,)), ValueError, "5"),
    (dict(restarts=(2.0,)), TypeError, "float"),
    (dict(restarts=("2",)), TypeError, "str"),
    (dict(restarts=(True,)), TypeError, "bool"),
    (dict(restarts=(3, 2)), ValueError, "3, 2"),
    (dict(restarts=(9,), method="direct"), ValueError, "9"),
    (dict(precision="exact", eps=1e-7), ValueError, "1e-07"),
    (dict(precision="exact", steps=3), ValueError, "3"),
    (dict(precision="exact", method="gram"), ValueError, "'gram'"),
    (dict(precision="exact", scale="none"), ValueError, "'none'"),
    (dict(X=None), TypeError, "NoneType"),
    (dict(X=3.0), TypeError, "float"),
    (dict(X="abc"), TypeError, "str"),
    (dict(X={"a": 1}), TypeError, "dict"),
    (dict(X=[[1.0, 2.0]]), TypeError, "list"),
    (dict(X=torch.ones(5)), ValueError, "(5,)"),
    (dict(X=torch.tensor(1.0)), ValueError, "()"),
    (dict(X=[torch.ones(2, 2), torch.ones(5)]), ValueError, "X[1]"),
    (dict(X=torch.ones(3, 3, dtype=torch.int64)), TypeError, "int64"),
    (dict(X=torch.ones(3, 3, dtype=torch.complex64)), TypeError, "complex64"),
    (dict(X=torch.eye(3).to_sparse()), TypeError, "sparse"),
    (dict(X=[torch.ones(2, 2), torch.ones(2, 2, device="meta")]), ValueError, "device"),
]


@pytest.mark.parametrize(("change", "error", "word"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error) as caught:
        polar(**{"X": torch.ones(4, 6), **change})
    assert word in str(caught.value)
    assert str(caught.value).split(":")[0] in ("polar", "coefficients", "newton_schulz")


def test_meta_tensors_have_shapes() -> None:
    for shape in ((3, 4), (2, 300, 200)):
        X = torch.ones(shape, device="meta", dtype=torch.bfloat16)
        for Q in (polar(X), orthonorm.polar_exact(X).factor):
            assert Q.shape == X.shape and Q.dtype == X.dtype and Q.device == X.device


# ---- odd polynomials -----------------------------------------------------------------------------
HARD_CAP = [  # min(1, x) on [0, 3.4], arXiv:2507.13338
    (0.805032, 0.206361, -0.019763), (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251), (1.004384, -0.183490, 0.014413),
]  # fmt: skip
POLYNOMIALS: dict[str, list[tuple[float, float, float]]] = {
    "hard cap": HARD_CAP,
    "soft cap": [(1.0, -0.158864, 0.0), (1.0, 0.158864, 0.0)],
    "negative": [(-1.0, 0.3, -0.02), (0.5, 0.0, 0.0), (1.0, 0.0, -0.01)],
    "cubic": [(1.5, -0.5, 0.0)] * 3,
    "reverse": [(-2.0, 0.0, 0.0)],
}


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("shape", [(20, 33), (140, 60), (2, 150, 150), (1, 1)], ids=str)
def test_odd_polynomial_is_a_map_of_singular_values(name: str, shape: tuple[int, ...]) -> None:
    """U f(S) V^T from an SVD; no scaling, so singular values up to 1.5 are mapped as they are."""
    triples = POLYNOMIALS[name]
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = S / S.amax() * 1.5
    X, f = (U * S.unsqueeze(-2)) @ Vh, S
    for a, b, c in triples:
        f = a * f + b * f**3 + c * f**5
    want = (U * f.unsqueeze(-2)) @ Vh
    rows = [plain_direct(x, triples) for x in X.float().view(-1, *shape[-2:])]
    plain = torch.stack(rows if shape[-2] <= shape[-1] else [x.T for x in rows]).view(shape)
    error = max((plain - want).norm().item(), 4 * 2.0**-23 * want.norm().item())
    product = ((U.float() * f.float().unsqueeze(-2)) @ Vh.float() - want).norm().item()
    allowed = 2 * error + 2 * product  # what makes X and `want` is a rounded product too
    assert (odd_polynomial(X, triples) - want).norm().item() <= allowed * 2.0**-29
    assert (odd_polynomial(X.float(), triples) - want).norm().item() <= 2 * error
    if name == "reverse":
        assert torch.equal(odd_polynomial(X, triples), -2 * X)


def test_hard_cap_caps() -> None:
    s = torch.linspace(0, 3.4, 40, dtype=torch.float64)
    capped = odd_polynomial(torch.diag(s), HARD_CAP).diagonal()
    assert (capped - s.clamp(max=1)).abs().max() < 0.034  # 0.0339 at x = 1, ALGORITHMS.md B10
    assert capped.max() < 1.011


@pytest.mark.parametrize(
    ("coefficients", "error", "word"),
    [
        (None, TypeError, "None"), ("hard_cap", TypeError, "hard_cap"), ([], ValueError, "0"),
        ([(1.0, 2.0)], ValueError, "(1.0, 2.0)"), ((1.0, 2.0, 3.0), ValueError, "1.0"),
        ([("a", 0, 0)], TypeError, "str"), ([(math.nan, 0, 0)], ValueError, "nan"),
        ([(math.inf, 0, 0)], ValueError, "inf"),
    ],
)  # fmt: skip
def test_odd_polynomial_refuses(coefficients: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error) as caught:
        odd_polynomial(torch.ones(3, 4), coefficients)
    assert word in str(caught.value)
    for X in (None, [torch.ones(3, 4)], torch.ones(4, dtype=torch.int32)):
        with pytest.raises(TypeError):
            odd_polynomial(X, HARD_CAP)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        odd_polynomial(torch.ones(3, 4), HARD_CAP, precision="exact")


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


@SHORT
@given(inputs(), st.sampled_from(["polar_express", "keller", "cubic5"]))
def test_any_finite_matrix(X: Tensor, name: str) -> None:
    c = resolve(name)
    Q = polar(X, name)
    assert Q.isfinite().all() and Q.shape == X.shape and Q.dtype == X.dtype
    if not X.any():
        assert not Q.any()
        return
    Judge(X, c).holds(Q, torch.float64 if X.dtype == torch.float64 else torch.float32)
