"""polar: zeros, what is not finite, views, options, refusals; odd_polynomial."""

from __future__ import annotations

import importlib
import math
from typing import Any

import orthonorm
import pytest
import torch
from orthonorm import odd_polynomial, polar
from orthonorm.coefficients import COEFFICIENTS, Coefficients, resolve
from polar_judge import (
    DTYPES,
    SETS,
    Judge,
    matrix,
    plain_direct,
)

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
    """A 1 x n or n x 1 matrix has one singular value, 1, and becomes f(1) x / |x|. The error of one
    is luck, so ten are judged together."""
    c = resolve(name)
    vectors = torch.randn(10, n, generator=torch.Generator().manual_seed(n)).double()
    judges = [Judge(x[None], c) for x in vectors]
    for precision in ("float32", "float64"):
        dtype = DTYPES[precision]
        ulp = torch.finfo(dtype).eps * max(j.exact.norm().item() for j in judges)
        allowed = 2 * math.hypot(*(j.plain(dtype).norm().item() for j in judges))
        allowed += math.sqrt(len(judges)) * 4 * ulp
        for X in (vectors[:, None], vectors[:, :, None], list(vectors[:, None])):
            results = polar(X, c, precision=precision)
            assert [q.shape for q in results] == [x.shape for x in X]
            pairs = zip(results, judges, strict=True)
            off = math.hypot(*(j.off(q.view(1, n), dtype).norm().item() for q, j in pairs))
            assert off <= allowed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_views_and_dtypes(dtype: torch.dtype) -> None:
    """Any strides; contiguous results in the dtype of X; X as it was."""
    c = resolve("keller")
    off, bound = [], []  # of all together: an expanded matrix has rank 1, its error is luck
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
                judge = Judge(x, c)
                off.append(judge.off(q.float(), torch.float32).norm().item())
                rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
                bound.append(judge.bound(torch.float32) + rounding * judge.exact.norm().item())
    assert math.hypot(*off) <= math.hypot(*bound)
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
    """The Gram form is told its restarts, the direct form is not the Gram form."""
    seen: list[list[int]] = []
    module = importlib.import_module("orthonorm.ops.newton_schulz")
    iterate = module.scaled_polynomial_.overload

    def told(*arguments: Any) -> None:
        *_, restarts, gram, _, _ = arguments
        seen.extend([restarts] if gram else [])
        iterate(*arguments)

    monkeypatch.setattr(module.scaled_polynomial_, "overload", told)
    X, c = matrix("log 1e-2", *shape).float(), resolve("polar_express")
    results = {}
    for restarts in ((2,), (1, 3), (1, 2, 3, 4)):
        seen.clear()
        results[restarts] = polar(X, method="gram", restarts=restarts, precision="float32")
        assert seen == [list(restarts)]
        Judge(X, c).holds(results[restarts], torch.float32, restarts)
    assert torch.equal(results[2,], polar(X, method="gram", precision="float32"))
    assert torch.equal(results[1, 3], polar(X, method="gram", restarts=[1, 3], precision="float32"))
    assert not torch.equal(results[2,], results[1, 3])
    seen.clear()
    Q = polar(X, method="direct", restarts=(2,), precision="float32")
    assert not seen
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
    (dict(precision="bf16"), ValueError, "'float16', 'exact', got 'bf16'"),
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
    assert word in str(caught.value) and str(caught.value).startswith("odd_polynomial: ")
    for X in (None, [torch.ones(3, 4)], torch.ones(4, dtype=torch.int32)):
        with pytest.raises(TypeError):
            odd_polynomial(X, HARD_CAP)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        odd_polynomial(torch.ones(3, 4), HARD_CAP, precision="exact")
