"""`state_dtype="float32"`: bfloat16 and float16 parameters with float32 state, every optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, reloaded, set_grads, snapshot
from orthonorm import optim
from orthonorm.optim.state import ADAMW_STATE
from torch import Tensor, nn

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = ((24, 40), (40, 24), (32, 32), (3, 8, 20))
ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
FLOAT32: dict[str, Any] = {"state_dtype": "float32"}


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if isinstance(t, Tensor) and k != "step"}


def run(opt: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(step, params)
        opt.step()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


@ALL
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_step_is_float32s_rounded_once(row: Row, dtype: torch.dtype) -> None:
    """From the same weights, gradients and state: weights to the bit, rounded; state to the bit."""
    small, wide = make(dtype, SHAPES), make(F32, SHAPES)
    once = {"retract": False} if row.name == "SSO" else {}  # else it writes weights twice
    a, b = build(row, small, **once, **FLOAT32), build(row, wide, **once)
    for step in range(4):
        with torch.no_grad():
            for p, q in zip(small, wide, strict=True):
                q.copy_(p)
        set_grads(step, small)
        for p, q in zip(small, wide, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for p, q in zip(small, wide, strict=True):
            assert torch.equal(p, q.to(dtype)), (step, p.shape)
            assert a.state[p].keys() == b.state[q].keys()
            for key, t in tensors(b.state[q]).items():
                assert a.state[p][key].dtype == F32 and torch.equal(a.state[p][key], t), key


@ALL
def test_wide_parameters_have_what_they_had(row: Row) -> None:
    for dtype in (F32, F64):
        one, other = make(dtype, SHAPES), make(dtype, SHAPES)
        a, b = build(row, one, **FLOAT32), build(row, other)
        for opt, params in ((a, one), (b, other)):
            run(opt, params, range(3))
        assert same(snapshot(a), snapshot(b))


@ALL
def test_saving_goes_on_to_the_bit(row: Row) -> None:
    """Through torch.save and load(weights_only=True), and deepcopy."""
    params, fresh = make(BF16, SHAPES), make(BF16, SHAPES)
    a, b = build(row, params, **FLOAT32), build(row, fresh, **FLOAT32)
    run(a, params, range(2))
    reloaded(a, b)
    assert same(snapshot(a), snapshot(b))
    c = copy.deepcopy(a)
    for opt in (a, b, c):
        run(opt, opt.param_groups[0]["params"], range(2, 4))
    assert same(snapshot(a), snapshot(b)) and same(snapshot(a), snapshot(c))


@ALL
@pytest.mark.parametrize("theirs", [{}, {"state_dtype": "8bit"}, {"state_dtype": "bfloat16"}])
def test_state_of_other_dtypes_loads_and_back(row: Row, theirs: dict[str, Any]) -> None:
    """It is rounded once to what is kept, and goes on from there."""
    a = build(row, make(BF16, SHAPES), **theirs)
    b, c = build(row, make(BF16, SHAPES), **FLOAT32), build(row, make(BF16, SHAPES))
    params = a.param_groups[0]["params"]
    run(a, params, range(2))
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["state_dtype"] == "float32"
    for p, q in zip(params, b.param_groups[0]["params"], strict=True):
        mine = tensors(b.state[q])
        assert {t.dtype for t in mine.values()} <= {F32} and "mantissa" not in mine
        if theirs.get("state_dtype") != "8bit":
            assert all(torch.equal(t, a.state[p][k].float()) for k, t in mine.items())
    run(b, b.param_groups[0]["params"], range(2, 3))
    c.load_state_dict(b.state_dict())
    for p, q in zip(b.state.values(), c.state.values(), strict=True):
        assert p.keys() == q.keys()
        named = (*c.elementwise_state(c.param_groups[0]), *ADAMW_STATE)  # other is float32 anyway
        for k, t in tensors(p).items():
            kept = BF16 if k in named else F32
            assert q[k].dtype == kept and torch.equal(t.to(kept), q[k]), k
    run(c, c.param_groups[0]["params"], range(3, 4))


def test_a_state_dict_of_a_float32_model_keeps_its_bits() -> None:
    """Of torch's own AdamW too: torch would cast it to the parameters' dtype."""
    for make_one in (optim.AdamW, torch.optim.AdamW):
        wide, small = make(F32, SHAPES), make(BF16, SHAPES)
        a, b = make_one(wide), optim.AdamW(small, **FLOAT32)
        run(a, wide, range(2))
        b.load_state_dict(a.state_dict())
        for p, q in zip(wide, small, strict=True):
            assert all(torch.equal(t, b.state[q][k]) for k, t in tensors(a.state[p]).items())


@pytest.mark.parametrize("rule", ["adamw", "matrix"])
def test_a_slow_average_decays(rule: str) -> None:
    """1000 steps of zero gradients at beta2 0.999: x0.368 (0.999^1000), where bfloat16 stands
    still."""
    left = {}
    for kind in (None, "float32"):
        (p,) = params = [nn.Parameter(torch.ones(8, 8, dtype=BF16))]
        if rule == "adamw":
            opt: Any = optim.AdamW(params, lr=1e-3, betas=(0.9, 0.999), state_dtype=kind)
        else:
            opt = optim.Conda(params, betas=(0.9, 0.999), state_dtype=kind)
        p.grad = torch.ones_like(p)
        opt.step()
        before = opt.state[p]["exp_avg_sq"].float().sum().item()
        p.grad.zero_()
        for _ in range(1000):
            opt.step()
        left[kind] = opt.state[p]["exp_avg_sq"].float().sum().item() / before
    assert left[None] == 1.0 and left["float32"] == pytest.approx(0.999**1000, rel=1e-4)


def test_views_companion_and_dtypes_together() -> None:
    """Heads, stacks, convolutions and vectors of three dtypes in one group: each as alone."""
    shapes = ((24, 8), (3, 8, 20), (6, 5, 3, 3), (7,))
    dtypes = (BF16, F32, F16, BF16)

    def made(which: slice, **more: Any) -> tuple[list[nn.Parameter], Any]:
        pairs = zip(make(F32, shapes), dtypes, strict=True)
        params = [nn.Parameter(p.detach().to(dtype)) for p, dtype in pairs]
        params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
        groups = [
            {"params": params[:1], "split": (8, 16), "heads": (2, 2)},
            {"params": params[1:3]},
            {"params": params[3:], "rule": "adamw"},
        ]
        return params, optim.NorMuon(groups[which], **more)

    params, opt = made(slice(3), **FLOAT32)
    assert opt.param_groups[2]["state_dtype"] == "float32"  # from the matrix rule
    for step in range(3):
        set_grads(step, params)
        opt.step()
    for i in range(3):
        fresh, alone = made(slice(i, i + 1), **FLOAT32)
        for step in range(3):
            set_grads(step, fresh)
            alone.step()
        for p, q in zip(params, fresh, strict=True):
            if q in alone.state:
                assert torch.equal(p, q)
                for key, t in tensors(alone.state[q]).items():
                    assert t.dtype == F32 and torch.equal(opt.state[p][key], t), key


@pytest.mark.parametrize("make_one", [optim.Muon, optim.NorMuon, optim.AdamW])
def test_flags_reach_the_step(make_one: Any) -> None:
    """A GradScaler's skipped step leaves weights and float32 state; its scale is divided out."""
    params, twins = make(BF16, SHAPES), make(BF16, SHAPES)
    a, b = make_one(params, fused=True, **FLOAT32), make_one(twins, **FLOAT32)
    assert a._step_supports_amp_scaling
    set_grads(0, params, twins)
    for p in params:
        p.grad *= 1024
    a.grad_scale, a.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    a.step()
    b.step()
    a.found_inf = torch.tensor(1.0)
    a.step()
    assert same(snapshot(a), snapshot(b))


def test_beside_mantissas() -> None:
    """Their state is float32 anyway; parameters of float16, which have none, get it by this."""
    params = make(BF16, SHAPES[:1]) + make(F16, SHAPES[:1])
    opt = optim.Muon(params, mantissa=True, **FLOAT32)
    run(opt, params, range(2))
    assert [opt.state[p]["momentum_buffer"].dtype for p in params] == [F32, F32]
    assert ["mantissa" in opt.state[p] for p in params] == [True, False]
