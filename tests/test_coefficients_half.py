"""Schedules in half precision, emulated: what is allowed holds, what is refused blows up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from orthonorm import coefficients as k
from orthonorm.coefficients import COEFFICIENTS, Coefficients, Triple, resolve

ALL = pytest.mark.parametrize("c", COEFFICIENTS.values(), ids=lambda c: c.name)
BROKEN = "aol_flipping"


def composed(triples: Sequence[Triple], x: float) -> float:
    """Written apart from the module: powers, no Horner, no overflow guard."""
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


# ---- half precision, emulated: stored in float16 or bfloat16, accumulated in float32 -------------
def spectra(n: int, m: int) -> torch.Tensor:
    """Five n x m matrices of Frobenius norm 1: two spread spectra, rank n/2, rank 1, constant."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(m, n, generator=g, dtype=torch.float64))[0]
    spikes = torch.cat([torch.ones(2), torch.logspace(-4, -7, n - 2)])
    half, one = (torch.arange(n) < n // 2).float(), (torch.arange(n) < 1).float()
    values = torch.stack([torch.logspace(0, -5, n), spikes, half, one]).double()
    x = torch.cat([(u * values[:, None]) @ v.T, torch.ones(1, n, m, dtype=torch.float64)])
    return x / torch.linalg.matrix_norm(x, keepdim=True)


SPECTRA = spectra(48, 192)


def norm(c: Coefficients, dtype: torch.dtype, form: str, restarts: tuple[int, ...] = ()) -> float:
    """Largest output spectral norm over the spectra, in units of the exact image's maximum."""

    def store(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float()

    x = store(SPECTRA / c.safety)
    r, q = store(x @ x.mT), torch.eye(x.shape[1])
    for t, (a, b, cc) in enumerate(c.steps()):
        if form == "direct" or t in restarts:
            x = x if form == "direct" else store(q @ x)
            r, q = store(x @ x.mT), torch.eye(x.shape[1])
        z = store(b * r + cc * (r @ r))
        if form == "direct":
            x = store(a * x + z @ x)
            continue
        q, rz = store(a * q + q @ z), store(a * r + r @ z)
        r = store(a * rz + z @ rz)
    out = x if form == "direct" else store(q @ x)
    if not out.isfinite().all():
        return math.inf
    return float(torch.linalg.matrix_norm(out, 2).max()) / max(
        map(abs, k.image(c.steps(), 0.0, 1 / c.safety))
    )


@ALL
def test_what_is_allowed_in_half_precision_holds(c: Coefficients) -> None:
    for name in ("float16", "bfloat16"):
        if name in c.safe_dtypes("direct"):
            assert norm(c, getattr(torch, name), "direct") < 1.05
    if "float16" in c.safe_dtypes("gram"):
        assert norm(c, torch.float16, "gram", k.default_restarts(c, "float16")) < 1.1
        for restarts in c.measured:
            assert norm(c, torch.float16, "gram", restarts) < 1.02


# (name, steps, dtype, form, restarts, what the message names): each is refused, and does blow up.
REFUSED = [
    ("polar_express", 5, "float16", "gram", (), r"use restarts=\(2,\) or form='direct', got"),
    ("polar_express", 8, "float16", "gram", (2,), r"restarts=\(2, 4\) .* > 400 \(float16\)"),
    ("polar_express_1.01", 5, "float16", "gram", (1,), r"restarts=\(1, 2\)"),
    ("polar_express_1.02", 5, "float16", "gram", (), r"restarts=\(2,\)"),
    ("you5", 5, "float16", "gram", (), r"restarts=\(2,\)"),
    ("you6", 6, "float16", "gram", (), r"restarts=\(2,\)"),
    ("deepseek_v4", 10, "float16", "gram", (2, 4), r"restarts=\(2, 4, 6\)"),
    ("deepseek_v4", 10, "float32", "gram", (), r"restarts=\(2, 4, 6\) .* > 1e\+07 \(float32\)"),
    ("polar_express_old", 8, "float32", "gram", (), r"restarts=\(1, 3, 5\)"),
    ("keller", 5, "float16", "gram", (), r"restarts=\(3,\) or form='direct'"),
    ("keller", 5, "bfloat16", "gram", (), r"store float16 .*\(restarts=\(3,\)\) or use form"),
    ("polar_express", 5, "bfloat16", "gram", (2,), "store float16 .* got bfloat16"),
    ("polar_express_raw", 8, "bfloat16", "direct", (), "'polar_express' or store float32 .* div"),
    ("cans", 8, "bfloat16", "direct", (), "use 'polar_express' or store float32 or float64, got"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda r: "-".join(map(str, r[:5])))
def test_what_is_refused_does_blow_up(row) -> None:
    name, steps, dtype, form, restarts, message = row
    c = resolve(name, steps)
    with pytest.raises(ValueError, match=f"^coefficients: .*{message}"):
        k.check_safe(c, dtype=dtype, form=form, restarts=restarts)
    k.check_safe(c, dtype=dtype, form=form, restarts=restarts, allow_unsafe=True)
    assert norm(c, getattr(torch, dtype), form, restarts) > 1.1


def test_refused_for_accuracy_or_by_the_polynomial_alone() -> None:
    for dtype in k.ROUNDOFF:
        with pytest.raises(ValueError, match="use 'polar_express' or 'aol', got aol_flipping"):
            k.check_safe(COEFFICIENTS[BROKEN], dtype=dtype, form="direct")
    pe = COEFFICIENTS["polar_express"]
    with pytest.raises(ValueError, match=r"use restarts=\(2,\) .* 2.7e\+12 > 1e\+07 \(float32\)"):
        k.check_safe(pe, dtype="float32", form="gram")
    k.check_safe(pe, dtype="float32", form="gram", restarts=(2,))
    k.check_safe(pe, dtype="float16", form="gram", restarts=[3])  # over the limit, but measured
    k.check_safe(COEFFICIENTS["keller"], dtype="float32", form="gram")
    k.check_safe(COEFFICIENTS["cubic5"], dtype="float16", form="gram")
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match="store float32 or float64"):
            k.check_safe(COEFFICIENTS["polar_express_raw"], dtype=dtype, form="direct")
    with pytest.raises(ValueError, match=r"got restarts=\(3,\)"):  # not measured at 8 steps
        k.check_safe(resolve(pe, 8), dtype="float16", form="gram", restarts=(3,))


def test_cubic5_needs_its_safety_in_bfloat16() -> None:
    """A constant 8 x 127 matrix rounds up by 0.39 %, past the zero of the first cubic at 1.0035."""
    published = dataclasses.replace(COEFFICIENTS["cubic5"], safety=1.0)
    with pytest.raises(ValueError, match=r"store float16 .* makes cubic5 change sign"):
        k.check_safe(published, dtype="bfloat16", form="direct")
    exact = torch.full((8, 127), 1 / math.sqrt(8 * 127), dtype=torch.float64)
    for c, expected in ((published, -1), (COEFFICIENTS["cubic5"], 1)):
        x = (exact / c.safety).bfloat16().float()
        for a, b, _ in c.triples:
            z = (b * (x @ x.T).bfloat16().float()).bfloat16().float()
            x = (a * x + z @ x).bfloat16().float()
        cosine = float((x.double() * exact).sum())
        assert cosine * expected > 0.3
