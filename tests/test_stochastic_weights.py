"""stochastic_rounding=True: steps of float32 weights, then rounded as ops/rounding.py says."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make
from orthonorm import optim
from orthonorm.ops.rounding import places, stochastic
from torch import Tensor, nn

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((24, 40), (40, 24), (3, 8, 20))
ROUNDED = [row for row in ROWS if optim.REGISTRY[row.name].mantissas]


def set_grads(step: int, *lists: list[nn.Parameter]) -> None:
    for params in lists:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(BF16).to(p.dtype)


def floats_of(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float()) for p in params]


def check_steps(a: Any, halves: list[nn.Parameter], b: Any, wide: list[nn.Parameter]) -> None:
    """Every step of `a` is one of `b` from the same weights, rounded with its seed."""
    for step in range(3):
        with torch.no_grad():
            for p, q in zip(halves, wide, strict=True):
                q.copy_(p)
        set_grads(step, halves, wide)
        a.step()
        b.step()
        for p, q in zip(halves, wide, strict=True):
            want = stochastic(q.detach(), torch.tensor(step), places(q)).to(BF16)
            assert torch.equal(p, want)
    assert {int(group["rounding_seed"]) for group in a.param_groups} == {3}


@pytest.mark.parametrize("row", ROUNDED, ids=lambda r: r.name)
def test_every_rule(row: Row) -> None:
    """With float32 state, as then a step is float32's but for its last rounding."""
    halves = make(BF16, SHAPES)
    wide = floats_of(halves)
    a = build(row, halves, stochastic_rounding=True, state_dtype="float32")
    check_steps(a, halves, build(row, wide), wide)


@pytest.mark.parametrize("decay", ["cautious", "clipped"])
def test_every_decay(decay: str) -> None:
    halves = make(BF16, SHAPES)
    wide = floats_of(halves)
    settings: dict[str, Any] = dict(decay=decay, weight_decay=0.1)
    more: dict[str, Any] = dict(stochastic_rounding=True, state_dtype="float32")
    check_steps(optim.Muon(halves, **settings, **more), halves, optim.Muon(wide, **settings), wide)


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]


def test_the_companion_too() -> None:
    halves = make(BF16, ((8, 6), (7,), (5, 9)))
    wide = floats_of(halves)
    a = optim.Muon(groups(halves), stochastic_rounding=True, state_dtype="float32")
    check_steps(a, halves, optim.Muon(groups(wide)), wide)


@pytest.mark.parametrize("make_one", [optim.AdamW, optim.Muon, optim.NorMuon])
def test_small_updates_add_up(make_one: Any) -> None:
    """Each is a fiftieth of what bfloat16 weights of 1 can change by: nearest stands still."""
    moved = {}
    for dtype, kind in ((BF16, False), (BF16, True), (F32, False)):
        p = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        opt = make_one([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=kind)
        generator = torch.Generator().manual_seed(0)
        p.grad = torch.randn(64, 64, generator=generator).to(dtype)
        for _ in range(100):
            opt.step()
        moved[dtype, kind] = (p.detach().float() - 1) * p.grad.float().sign()
    assert not moved[BF16, False].any()
    mine, want = moved[BF16, True].mean(), moved[F32, False].mean()
    # One weight is off by 2^-7 sqrt(100 * 1e-4 * 2^7) = 0.009 (standard deviation); 4096 of them
    assert want < -1e-4 and abs(mine - want) < 4 * 0.009 / 64


def test_other_dtypes_are_rounded_to_nearest() -> None:
    for dtype in (F32, torch.float16, torch.float64):
        p, q = ([nn.Parameter(x.detach().to(dtype)) for x in make(F32, SHAPES)] for _ in range(2))
        a, b = optim.Muon(p, stochastic_rounding=True), optim.Muon(q)
        for step in range(2):
            set_grads(step, p, q)
            a.step()
            b.step()
        assert all(torch.equal(x, y) for x, y in zip(p, q, strict=True))


def test_a_state_dict_resumes_to_the_bit() -> None:
    params = make(BF16, ((8, 6), (7,), (5, 9)))
    opt = optim.Muon(groups(params), stochastic_rounding=True)
    set_grads(0, params)
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = optim.Muon(groups(twins), stochastic_rounding=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    third = copy.deepcopy(other)
    set_grads(1, params, twins, [p for group in third.param_groups for p in group["params"]])
    for one in (opt, other, third):
        one.step()
    copies = [p for group in third.param_groups for p in group["params"]]
    for p, q, r in zip(params, twins, copies, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_a_skipped_step_leaves_weights() -> None:
    (p,) = params = make(BF16, ((8, 6),))
    opt = optim.Muon(params, stochastic_rounding=True, nonfinite="skip")
    set_grads(0, params)
    opt.step()
    before: Tensor = p.detach().clone()
    assert p.grad is not None
    p.grad[0, 0] = float("nan")
    opt.step()
    assert torch.equal(p, before) and opt.param_groups[0]["skipped"] == 1


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [("Muon", {"mantissa": True}, "must be False with mantissa=True"),
     ("AdamW", {"mantissa": True}, "must be False with mantissa=True"),
     ("Muon", {"capturable": True}, "capturable must be False"),
     ("Conda", {}, "its step rounds weights to nearest, got state_dtype=None"),
     ("SSO", {"state_dtype": "8bit"}, "its step rounds weights to nearest, got state_dtype='8bit'"),
     ("StiefelAdam", {"state_dtype": "float32"}, "unless state_dtype is 'bfloat16'")],
)  # fmt: skip
def test_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*{word}"):
        optim.REGISTRY[name](make(BF16, SHAPES[:1]), stochastic_rounding=True, **settings)
