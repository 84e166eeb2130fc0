"""The passes over lists of tensors at the edges: norms at every scale, zeros, infinities."""

from __future__ import annotations

import math

import pytest
import torch
from orthonorm import ops
from passes import (
    BF16,
    F16,
    F32,
    F64,
    LISTS,
    MATRICES,
    MIXES,
    distance,
    make,
    mapped,
    op,
    run,
    same,
)
from torch import Tensor


# ---- norms ---------------------------------------------------------------------------------------
def norms_of(name: str, X: Tensor) -> Tensor:
    """The norm as `magnitude` gives it, or muon_prologue_ with momentum 0, where U is G."""
    if name == "magnitude":
        return ops.magnitude([X])
    buffers, updates = torch.zeros_like(X), torch.empty_like(X)
    norms = ops.muon_prologue_([X], [buffers], [updates], torch.tensor(0.0))
    if bool(X.isfinite().all()):  # 0 * inf is not 0
        assert same(updates, X)
    return norms


RANGES = {F32: (-149, 120), BF16: (-133, 120), F16: (-24, 8), F64: (-1074, 1012)}


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("name", MATRICES)
def test_a_power_of_two_moves_the_norm_by_itself(name: str, dtype: torch.dtype) -> None:
    low, high = RANGES[dtype]
    # Small integers: exact at every scale, denormals included.
    X = torch.randint(-15, 16, (130, 190), generator=torch.Generator().manual_seed(0)).double()
    norm = norms_of(name, X.to(dtype))
    for k in [*range(low, high, 37), low, high]:
        scaled = torch.ldexp(X, torch.tensor(k)).to(dtype)
        assert torch.equal(norms_of(name, scaled), torch.ldexp(norm, torch.tensor(k))), k


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("name", MATRICES)
def test_scales_within_one_matrix(name: str, dtype: torch.dtype) -> None:
    """Blocks of very different sizes, the largest first, last and alone."""
    small, large = (1e-40, 1e36) if dtype != F64 else (1e-310, 1e300)
    for rows in ([0], [99], [0, 50], []):
        X = torch.full((100, 300), small, dtype=dtype)
        X[rows] = large
        exact = math.hypot(*[float(X[i, 0]) * math.sqrt(300) for i in range(100)])
        assert norms_of(name, X).item() == pytest.approx(exact, rel=1e-15)


@pytest.mark.parametrize("dtype", MIXES["half-states"][1:] + (F64,))
@pytest.mark.parametrize("name", MATRICES)
def test_zeros_and_non_finite_entries_stay_in_their_matrix(name: str, dtype: torch.dtype) -> None:
    X = torch.ones(6, 30, 40, dtype=dtype)
    X[1] = 0
    X[2, 29, 39] = math.inf
    X[3, 0, 0] = math.nan
    X[4, 3, 3] = -math.inf
    norms = norms_of(name, X).tolist()
    assert norms[0] == norms[5] == math.sqrt(1200)
    assert norms[1] == 0.0
    assert not any(math.isfinite(n) for n in norms[2:5])


def test_updates_are_measured_before_they_are_rounded() -> None:
    G, B = torch.randn(50, 60), torch.randn(50, 60)
    norms = {}
    for dtype in (F32, BF16, F16):
        updates = torch.empty(50, 60, dtype=dtype)
        norms[dtype] = ops.muon_prologue_([G], [B.clone()], [updates], torch.tensor(0.9)).item()
    assert norms[BF16] == norms[F16] == norms[F32]


def test_muon_prologue_overwrites_whatever_updates_held() -> None:
    updates = torch.full((50, 60), math.nan, dtype=BF16)
    ops.muon_prologue_([torch.ones(50, 60)], [torch.zeros(50, 60)], [updates], torch.tensor(0.5))
    assert torch.equal(updates, torch.full((50, 60), 0.75, dtype=BF16))


# ---- edges of the arithmetic ---------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e36, 0.0])
@pytest.mark.parametrize("name", LISTS)
def test_scales_follow_the_reference(name: str, scale: float) -> None:
    """Overflow where the reference does; else twice its error, or a denormal's rounding."""
    arguments = mapped(make(name, [(33, 65)]), lambda t: t * scale if t.dim() else t)
    exact = run(op(name).reference, name, mapped(arguments, Tensor.double))
    kernel = run(op(name), name, arguments)
    reference = run(op(name).reference, name, arguments)
    for label in reference:
        a, b, c = kernel[label][0], reference[label][0], exact[label][0]
        finite = b.isfinite()
        assert same(finite, a.isfinite()), label
        error, allowed = (distance([v[finite]], [c[finite]]) for v in (a, b))
        unit = 1e-14 * float(c.norm()) if label == "norms" else math.sqrt(b.numel()) * 2.0**-149
        assert error <= 2 * allowed + unit, label


def test_zero_over_zero_is_zero() -> None:
    M, V, X = (torch.zeros(9, 40) for _ in range(3))
    ops.rotated_adam_([M], [V], [X], 0.9, 0.99, 0.0)
    assert torch.equal(X, torch.zeros(9, 40))
    W, G, step = torch.ones(9, 40), torch.zeros(9, 40), torch.zeros(())
    rate, decay = torch.tensor(0.1), torch.tensor(0.0)
    ops.adamw_step_([W], [G], [M], [V], [step], rate, 0.9, 0.99, 0.0, decay)
    assert torch.equal(W, torch.ones(9, 40))


@pytest.mark.parametrize("name", ["rotated_adam_", "decayed_update_", "adamw_step_"])
def test_non_finite_entries_stay_where_they_are(name: str) -> None:
    arguments = make(name, [(40, 50), (7,)])
    clean = run(op(name), name, arguments)
    source = LISTS[name][2 if name == "rotated_adam_" else 1]
    arguments[source][0][3, 4], arguments[source][0][5, 6] = math.nan, math.inf
    dirty = run(op(name), name, arguments)
    for label in set(clean) - {"steps"}:
        expected = torch.ones(40, 50, dtype=torch.bool)
        expected[3, 4] = expected[5, 6] = False
        assert torch.equal(clean[label][0][expected], dirty[label][0][expected])
        assert dirty[label][0][3, 4].isnan()
        assert same(clean[label][1], dirty[label][1])


def test_float64_is_rounded_once_to_half_precision() -> None:
    """Half a unit and a bit: a float in between would drop the bit, and the tie goes to even."""
    for dtype, unit in ((BF16, 2.0**-7), (F16, 2.0**-10)):
        above = 1 + unit / 2 + 2.0**-40
        w = torch.full((3, 100), 1.0, dtype=dtype)
        u = torch.full((3, 100), 1.0 - above, dtype=F64)
        ops.decayed_update_([w], [u], torch.tensor(1.0, dtype=F64), torch.tensor(0.0), [1.0])
        assert torch.equal(w, torch.full((3, 100), 1 + unit, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_conversions_are_those_of_torch(dtype: torch.dtype) -> None:
    """Every 16-bit pattern read, every neighbourhood of a rounding boundary written."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = torch.zeros(2**16)
    wide, numbers = torch.zeros(2**16), (torch.tensor(-1.0), torch.tensor(0.0))
    ops.decayed_update_([wide], [every], *numbers, [1.0])
    assert same(wide, zeros + every.float())
    between = wide.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0x1000, 0x7FFF, 0x8000])
    values = between.to(torch.int32).view(F32).reshape(-1)
    back = torch.zeros(values.shape, dtype=dtype)
    ops.decayed_update_([back], [values], *numbers, [1.0])
    assert same(back, (0.0 + values).to(dtype))
