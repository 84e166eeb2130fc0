"""Row, column and factored moments and norms: the same bits, bad arguments, known optimizers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from moments import (
    BF16,
    EPS,
    EPS_AT,
    F32,
    F64,
    NORMS,
    assert_rule,
    check_moment,
    compiled,
    generator,
    like,
    lists,
    matrix,
    moments,
    norms,
    state,
    transposed,
    updated,
)
from orthonorm import ops
from orthonorm._library import OPS, has_kernel
from torch import Tensor

# ---- determinism ---------------------------------------------------------------------------------
MANY = [(300, 1100), (5, 7), (1100, 300), (1, 40), (200, 64), (40, 1), (64, 4000)]


def many(name: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """Tensor lists of `name`, every other matrix transposed."""
    rows = []
    for i, shape in enumerate(MANY):
        x = matrix(shape, dtype, i)
        rows.append([*state(name, shape, F32, i), transposed(x) if i % 2 else x])
    return [list(column) for column in zip(*rows, strict=True)]


def clones(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[like(t) for t in tensors] for tensors in lists]


def equal(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> bool:
    flat = itertools.chain.from_iterable
    return all(torch.equal(s, t) for s, t in zip(flat(a), flat(b), strict=True))


@compiled
@moments
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=lambda d: str(d)[6:])
def test_lists_batches_and_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    start = many(name, dtype)
    for args in ((0.9, 1e-8), (0.9, 0.1, "inside", True), (0.9, 0.1, "clamp", False)):
        whole = clones(start)
        OPS[name](*whole, *args)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = clones(start)
            OPS[name](*again, *args)
            assert equal(whole, again), threads
        torch.set_num_threads(1)
        for i in range(len(MANY)):
            alone = clones([[tensors[i]] for tensors in start])
            OPS[name](*alone, *args)
            assert equal([[tensors[i]] for tensors in whole], alone)
        single = [tensors[0] for tensors in clones(start)]
        batch = [torch.stack([t, t.neg() if t is single[-1] else t]) for t in single]
        OPS[name](*lists(batch), *args)
        assert all(torch.equal(b[0], tensors[0]) for b, tensors in zip(batch, whole, strict=True))


@compiled
@norms
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=lambda d: str(d)[6:])
def test_norm_batches_and_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    for x in many(name, dtype)[-1]:
        want = OPS[name](x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(OPS[name](x), want)
        want = OPS[name](x.contiguous())  # as it lies in the batch
        assert torch.equal(OPS[name](torch.stack([x.neg(), x]))[1], want)


@compiled
@pytest.mark.parametrize("isa", ("portable", "avx2"))
def test_instruction_sets(isa: str) -> None:
    """The error rule once more, in a process that must do without the processor's best."""
    tests = ["test_moment_layouts", "test_moment_large", "test_norm_error", "test_zeros_stay_zeros"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    file = Path(__file__).parent / "test_normalize.py"
    command += [f"{file}::{test}" for test in tests]
    result = subprocess.run(
        command,
        env={**os.environ, "ORTHONORM_ISA": isa},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


# ---- bad arguments reach no memory ---------------------------------------------------------------
@moments
def test_bad_arguments_write_nothing(name: str) -> None:
    """Past the Python checks, as inner loops call them."""
    good = [*lists(state(name, (4, 6))), [matrix((4, 6))]]
    for spoil in (
        lambda bad: bad[0].append(bad[0][0]),
        lambda bad: bad[0].__setitem__(0, torch.zeros(1, 1)),
        lambda bad: bad[0].__setitem__(0, torch.zeros(4)),
        lambda bad: bad[-1].__setitem__(0, torch.zeros(4, 1).expand(4, 6)),
        lambda bad: bad[-1].__setitem__(0, torch.zeros(6)),
        lambda bad: bad[-1].__setitem__(0, torch.zeros(4, 6, dtype=torch.int64)),
    ):
        bad = clones(good)
        spoil(bad)
        before = clones([[t.contiguous() for t in tensors] for tensors in bad])
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            OPS[name].overload(*bad, 0.9, 1e-8)
        if has_kernel(name, "CPU"):  # the reference of an expanded X fails after its moments
            assert equal([[t.contiguous() for t in tensors] for tensors in bad], before)
    with pytest.raises((RuntimeError, ValueError), match="eps_at"):
        OPS[name].overload(*clones(good), 0.9, 1e-8, "around")


def test_an_expanded_matrix_can_be_normalized() -> None:
    x = matrix((5, 1)).expand(5, 7)
    for name in NORMS:
        assert_rule(OPS[name](x), OPS[name].reference(x), OPS[name].reference(x.double()), name)


# ---- what optimizers make of them ----------------------------------------------------------------
def test_normuon() -> None:
    """The recursion of zichongli5/NorMuon on given orthogonalized updates, in float64."""
    g = generator(3)
    for m, n in ((12, 5), (5, 12)):
        moment, ours = torch.zeros(m, 1, dtype=F64), torch.zeros(m, 1, dtype=F64)
        for _ in range(6):
            update = torch.linalg.qr(torch.randn(max(m, n), min(m, n), generator=g, dtype=F64))[0]
            update = update if m >= n else update.mT.contiguous()
            mine = update.clone()
            before = update.norm()
            moment.lerp_((update * update).mean(-1, keepdim=True), 1 - 0.95)
            update = update * (1 / (moment.sqrt() + 1e-10))
            update = update * (before / (update.norm() + 1e-10))
            ops.row_moment_([ours], [mine], 0.95, 1e-10)
            torch.testing.assert_close(mine, update, rtol=1e-9, atol=0)
            torch.testing.assert_close(ours, moment, rtol=1e-12, atol=0)


def test_scion() -> None:
    """ALGORITHMS: ColNorm g_j / (RMS_j + 1e-8), RowNorm g_i / (|g_i| sqrt(d_in) + 1e-8)."""
    grad = matrix((9, 14), F64)
    out, d_in = grad.shape
    column_rms = grad.square().mean(0, keepdim=True).sqrt()
    row_norm = grad.square().sum(1, keepdim=True).sqrt()
    for got, want in (
        (ops.column_normalize(grad, out**-0.5, 1e-8), grad / (column_rms + 1e-8)),
        (ops.column_normalize(grad, d_in / out**0.5, 1e-8), grad / (column_rms * d_in + 1e-8)),
        (ops.row_normalize(grad, d_in**0.5, 1e-8), grad / (row_norm * d_in**0.5 + 1e-8)),
        (ops.row_normalize(grad, 1.0, 1e-8), grad / (row_norm + 1e-8)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_adafactor() -> None:
    """arXiv:1804.04235, algorithm 4 with sums instead of means: U = G / sqrt(R C / 1^T R)."""
    m, n = 8, 13
    R, C = torch.zeros(m, 1, dtype=F64), torch.zeros(1, n, dtype=F64)
    r, c = torch.zeros(m, 1, dtype=F64), torch.zeros(1, n, dtype=F64)
    for step in range(1, 6):
        beta2 = 1 - step**-0.8
        grad = matrix((m, n), F64, step)
        R = beta2 * R + (1 - beta2) * (grad * grad).sum(1, keepdim=True)
        C = beta2 * C + (1 - beta2) * (grad * grad).sum(0, keepdim=True)
        want = grad / (R @ C / R.sum()).sqrt()
        ops.factored_moment_([r], [c], [grad], beta2, 0.0, keep_norm=False)
        torch.testing.assert_close(grad, want, rtol=1e-12, atol=0)


@moments
def test_norm_is_kept(name: str) -> None:
    for eps_at, eps in itertools.product(EPS_AT, EPS):
        x = matrix((50, 70))
        *_, y = updated(OPS[name], [*state(name, x.shape), x], 0.5, eps, eps_at)
        assert abs(y.double().norm() / x.double().norm() - 1) < 1e-7


def test_a_rank_one_square_is_met_exactly() -> None:
    """V of a first step is r c^T / mean(r) = X^2 where X^2 has rank one, so X becomes its signs."""
    g = generator(5)
    signs = torch.randn(40, 60, generator=g).sign()
    x = signs * torch.rand(40, 1, generator=g).add(0.1) * torch.rand(1, 60, generator=g).add(0.1)
    r, c = torch.zeros(40, 1), torch.zeros(1, 60)
    ops.factored_moment_([r], [c], [x], 0.0, 0.0, keep_norm=False)
    torch.testing.assert_close(x, signs, rtol=1e-6, atol=0)


def test_eps_crosses_over_smoothly() -> None:
    """`factored_moment_` takes small eps another way than large ones: no step in between."""
    x = matrix((60, 90))
    for eps_at in EPS_AT:
        for eps in (10.0**k for k in range(-14, 3)):
            check_moment("factored_moment_", (60, 90), "contiguous", (F32, F32), 0.9, eps, eps_at)
            tensors = [*state("factored_moment_", x.shape), x]
            near, far = (
                updated(ops.factored_moment_, tensors, 0.9, e, eps_at)[-1]
                for e in (eps, eps * (1 + 1e-9))
            )
            torch.testing.assert_close(near, far, rtol=3e-7, atol=0)
