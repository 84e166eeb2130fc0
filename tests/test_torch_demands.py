"""What torch's optimizers take and refuse, of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads, snapshot
from orthonorm import optim
from torch import nn

ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
SHAPES = ((12, 7), (7, 12))


def test_inputs_and_errors_of_torchs_own_tests() -> None:
    """`inputs_of_torch.py`, in a process of its own: torch's module locks global flags."""
    command = [sys.executable, "-m", "pytest", "inputs_of_torch.py"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2_000:]


@ALL
def test_keywords_of_torch(row: Row) -> None:
    results = []
    for more in ({}, dict(foreach=True, fused=None), dict(foreach=False, differentiable=False)):
        params = make(torch.float32, SHAPES)
        opt = build(row, [{"params": params, "capturable": False}], **more)
        for step in range(2):
            set_grads(step, params)
            opt.step()
        results.append(snapshot(opt))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    for key, value in (("differentiable", True), ("foreach", "yes"), ("capturable", None)):
        with pytest.raises(ValueError, match=f"{row.name}: {key}"):
            build(row, make(torch.float32, SHAPES), **{key: value})


@ALL
def test_capturable_where_the_host_decides_nothing(row: Row) -> None:
    params = make(torch.float32, SHAPES)
    if optim.REGISTRY[row.name].counts_steps:
        with pytest.raises(ValueError, match="counts steps"):
            build(row, params, capturable=True)
        assert build(row, [{"params": params, "rule": "adamw"}], capturable=True)
        return
    assert build(row, params, capturable=True)
    with pytest.raises(ValueError, match="nonfinite"):
        build(row, params, capturable=True, nonfinite="skip")
    opt = build(row, params[:1])
    with pytest.raises(ValueError, match="telemetry"):
        opt.add_param_group({"params": params[1:], "capturable": True, "telemetry": 3})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", ["PolarGrad", "SteepestDescent"])
def test_dual_norms_may_leave_float16(name: str) -> None:
    """Gradients of 1e4 have nuclear norms that float16 does not hold; their steps are fine."""
    G = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 1e4
    half, wide = (
        nn.Parameter(torch.zeros(64, 96, dtype=t)) for t in (torch.float16, torch.float64)
    )
    for p in (half, wide):
        p.grad = G.to(torch.float16).to(p.dtype)
        optim.REGISTRY[name]([p], lr=1e-6, precision="full").step()
    largest = wide.detach().abs().max().item()
    assert largest > 0.01 and half.isfinite().all()
    torch.testing.assert_close(half.double(), wide, rtol=4e-2, atol=4e-2 * largest)
