"""State of matrices is in float32 beside weights of 16 bits: averages move, Grams are finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads
from orthonorm import optim
from orthonorm.optim.state import ADAMW_STATE
from torch import Tensor, nn

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = ((24, 40), (40, 24), (32, 32), (3, 8, 20))


def traces(make_one: Any, dtype: torch.dtype, shrink: int, steps: int) -> list[float]:
    """Traces of both Gram matrices; gradients are a 20th from step `shrink` on."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(16, 24, generator=generator).to(dtype))
    opt = make_one([p])
    for step in range(steps):
        g = torch.randn(16, 24, generator=generator).to(BF16)  # the same of both dtypes
        p.grad = (g / 20 if step >= shrink else g).to(dtype)
        opt.step()
    grams = [opt.state[p][f"{side}_gram"] for side in ("left", "right")]
    return [A.double().diagonal().sum().item() for A in grams]


@pytest.mark.parametrize(("make_one", "shrink"), [(optim.Shampoo, 10**9), (optim.SPlus, 50)])
def test_averages_of_bfloat16_weights_move(make_one: Any, shrink: int) -> None:
    """In bfloat16 Shampoo's sum fell behind by 7 % after 400 steps, SPlus's average stood still."""
    mine, wanted = (traces(make_one, dtype, shrink, 400) for dtype in (BF16, F32))
    assert mine == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("make_one", [optim.Shampoo, optim.SOAP, optim.SPlus])
def test_float16_stays_finite(make_one: Any) -> None:
    """Gradients around 50, of which a Gram matrix has entries above 65504."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(64, 96, generator=generator).to(F16))
    opt, before = make_one([p]), p.detach().clone()
    for _ in range(30):
        p.grad = (50 * torch.randn(64, 96, generator=generator)).to(F16)
        opt.step()
    assert p.isfinite().all() and not torch.equal(p, before)
    for key, t in opt.state[p].items():
        assert not isinstance(t, Tensor) or t.isfinite().all(), key
    assert (p.grad.float() @ p.grad.float().mT).max() > 65504


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_dtypes_and_state_saved_in_16_bits(row: Row, dtype: torch.dtype) -> None:
    """State of matrices is at least float32; what was saved in 16 bits is cast up, and goes on."""
    wanted = torch.promote_types(dtype, F32)
    a, b = (build(row, make(dtype, SHAPES)) for _ in range(2))
    params = a.param_groups[0]["params"]
    for step in range(2):
        set_grads(step, params)
        a.step()
    saved, own = a.state_dict(), {*a.elementwise_state(a.param_groups[0]), *ADAMW_STATE, "step"}
    for state in saved["state"].values():
        for key, t in state.items():
            if isinstance(t, Tensor) and key not in own:
                assert t.dtype == wanted, key
                state[key] = t.to(dtype)
    b.load_state_dict(saved)
    for p, q in zip(params, b.param_groups[0]["params"], strict=True):
        for key, t in a.state[p].items():
            if isinstance(t, Tensor) and key not in own:
                assert b.state[q][key].dtype == wanted, key
    for p in b.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    b.step()
    assert all(p.isfinite().all() for p in b.param_groups[0]["params"])
