"""Orthogonalization of any shape, in any company, on any number of threads, in any process.

ORTHONORM_EXAMPLES=10000 judges as many random shapes as that; the suite takes 60.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import compiled
from orthonorm import polar
from orthonorm.coefficients import resolve
from orthonorm.ops import muon_step_
from orthonorm.ops.words import triples_of
from orthonorm.orthogonalize import choose
from orthonorm.polar import polynomial
from polar_judge import DTYPES, Judge, matrix
from torch import Tensor

EXAMPLES = int(os.environ.get("ORTHONORM_EXAMPLES", "60"))
KELLER = [3.4445, -4.7750, 2.0315] * 5
SPECTRA = ("gaussian", "log 1e-2", "log 1e-5", "rank n/2", "two spikes", "power law",
           "condition 1e-6")  # fmt: skip
LISTS = [[(40, 40)] * 3, [(33, 410), (410, 33)], [(160, 200)] * 5, [(300, 700), (301, 97)]]
PRECISIONS = ("auto", "float32", "bfloat16")


@given(
    side=st.integers(1, 120),
    aspect=st.floats(1.0, 6.0),
    tall=st.booleans(),
    kind=st.sampled_from(SPECTRA),
    precision=st.sampled_from(("float32", "bfloat16")),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 60)
def test_random_shapes(
    side: int, aspect: float, tall: bool, kind: str, precision: str, seed: int
) -> None:
    """err(polar) <= 2 err(plain torch in the same dtype, of the form chosen), against float64."""
    m, n = side, math.ceil(side * aspect)
    X = matrix(kind, *((n, m) if tall else (m, n)), seed=seed).float()
    numbers, restarts, *_ = polynomial("keller", precision=precision)
    form = choose(X, triples_of(numbers), restarts, "auto", precision).form
    gram = form == "gram" and precision == "float32"  # in bfloat16 it is as exact as direct
    Q = polar(X, "keller", precision=precision)
    Judge(X, resolve("keller")).holds(Q, DTYPES[precision], restarts if gram else None)


@pytest.mark.parametrize("shape", [(1, 4096), (4096, 1), (33, 4097), (1, 65536)], ids=str)
def test_long_matrices_are_touched_once(shape: tuple[int, int]) -> None:
    """A single row as well: in direct form 65536 numbers took 36 ms instead of 0.4 (2026-11)."""
    numbers, restarts, *_ = polynomial("keller", precision="float32")
    X = torch.empty(shape)
    how = choose(X, triples_of(numbers), restarts, "auto", "auto")
    assert (how.small, how.form) == ((True, "direct") if 1 in shape else (False, "gram"))


def step(shapes: list[tuple[int, int]], rows: list[int], precision: str) -> list[Tensor]:
    """Weights and momenta of `rows` after a Muon step on those alone."""
    tensors = [matrix("gaussian", *s, seed=i).float() for i, s in enumerate(shapes)]
    params, momenta = ([t.clone() for t in tensors] for _ in "wm")
    picked = [[values[i] for i in rows] for values in (params, tensors, momenta)]
    rates = map(torch.tensor, (0.02, 0.95, 0.1))
    muon_step_(*picked, *rates, [0.5] * len(rows), KELLER, [], precision=precision)
    return picked[0] + picked[2]


@compiled
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shapes", LISTS, ids=str)
def test_company_threads_and_runs_change_no_bit(
    shapes: list[tuple[int, int]], precision: str
) -> None:
    matrices = [matrix("log 1e-2", *s, seed=i).float() for i, s in enumerate(shapes)]
    rows = list(range(len(shapes)))
    want, stepped = polar(matrices, precision=precision), step(shapes, rows, precision)
    same = len(set(shapes)) == 1
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            again = [*polar(matrices, precision=precision), *step(shapes, rows, precision)]
            alone = [polar(x, precision=precision) for x in matrices]
            assert all(map(torch.equal, again, [*want, *stepped])), count
            assert all(map(torch.equal, alone, want)), count
            if same:
                batch = polar(torch.stack(matrices), precision=precision)
                assert torch.equal(batch, torch.stack(want)), count
            for i in rows:
                one = step(shapes, [i], precision)
                assert all(map(torch.equal, one, (stepped[i], stepped[len(rows) + i]))), count
    finally:
        torch.set_num_threads(threads)


@compiled
def test_several_python_threads_at_once() -> None:
    """Workspaces are shared between calls, never between calls that overlap."""
    matrices = [matrix("gaussian", *s).float() for s in ((700, 600), (300, 1200), (90, 100))] * 4
    want = [polar(x) for x in matrices]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(polar, matrices), want))


@compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1100, 1100), (500, 2000), (40, 128, 128)], ids=str)
def test_numbers_of_an_earlier_call_are_not_seen(shape: tuple[int, ...], precision: str) -> None:
    """Memory of large products stays for the next call, as it was left: here full of NaN."""
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = polar(X, precision=precision)
    assert polar(X * math.nan, precision=precision).isnan().all()
    assert torch.equal(polar(X, precision=precision), want)


NESTED = """
import ctypes, torch
from orthonorm import ops, polar
from orthonorm._library import OPS
def made():
    g = torch.Generator().manual_seed(0)
    shapes = ((300, 1200), (260, 250), (40, 32, 32), (1, 5000))
    return [torch.randn(*s, generator=g) for s in shapes]
def work():
    X = made()
    u, v = ([torch.ones(*x.shape[:-2], x.shape[d]) for x in X] for d in (-2, -1))
    sigma = OPS["power_iteration_"](X, u, v, 2)
    moments = [torch.ones(*x.shape[:-2], x.shape[-2], 1) for x in X]
    found = [*polar(X), *map(ops.row_normalize, X), *map(ops.column_normalize, X), sigma, *u, *v]
    OPS["row_moment_"](moments, X, 0.9, 1e-8)
    return [*found, *moments, *X]
path = next(word for word in open("/proc/self/maps").read().split() if "libgomp" in word)
gomp, inside, results = ctypes.CDLL(path), [], []
torch.set_num_threads(2)
want = work()
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    inside.append(gomp.omp_in_parallel())
    results.append(work())
gomp.GOMP_parallel(body, None, 2, 0)
assert inside == [1, 1], inside
assert all(torch.equal(a, b) for found in results for a, b in zip(found, want, strict=True))
print("equal")
"""


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs torch's libgomp by name")
def test_nested_parallelism() -> None:
    """Called by every thread of an OpenMP region of torch's own runtime."""
    done = subprocess.run(
        [sys.executable, "-c", NESTED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "equal", done.stderr


FORKED = """
import torch, torch.multiprocessing as mp
from orthonorm import polar
def work(i):
    torch.set_num_threads(1)  # as DataLoader's workers
    return polar(X).numpy().tobytes()
X = torch.randn(500, 700, generator=torch.Generator().manual_seed(0))
want = polar(X).numpy().tobytes()
with mp.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(4)) == [want] * 4
print("equal")
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_workers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_unaligned_overlapping_and_denormal() -> None:
    c = resolve("keller")
    storage = torch.randn(200 * 321 + 1, generator=torch.Generator().manual_seed(0))
    views = {
        "unaligned": storage[1:].view(200, 321),
        "overlapping": storage.as_strided((200, 321), (7, 1)),
        "repeated": storage[:321].expand(200, 321),
        "denormal": storage[1:].view(200, 321) * 2.0**-135,
    }
    for what, X in views.items():
        for precision in ("float32", "bfloat16"):
            Q = polar(X, c, precision=precision)
            assert torch.equal(Q, polar(X.contiguous(), c, precision=precision)), what
            if what != "repeated":  # of rank 1: its error is one number's luck
                Judge(X, c).holds(Q, DTYPES[precision])


def test_overlapping_weights_are_refused_before_anything_is_written() -> None:
    w, g = torch.zeros(1, 9).expand(5, 9), torch.ones(5, 9)
    b, rates = torch.zeros(5, 9), map(torch.tensor, (0.1, 0.9, 0.0))
    with pytest.raises((ValueError, RuntimeError), match="expanded"):
        muon_step_([w], [g], [b], *rates, [1.0], KELLER, [])
    assert not w.any()
