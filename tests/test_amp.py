"""GradScaler's flags read on the device, and float32 weights kept as bfloat16 and a mantissa."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from orthonorm import optim
from orthonorm._library import OPS
from orthonorm.ops import steps
from orthonorm.ops.mantissa import joined, split_
from passes import (
    BF16,
    F32,
    F64,
    LISTS,
    MIXES,
    bits,
    check_errors,
    check_halves_of_adamw,
    make,
    mapped,
    mutated,
    run,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(5, 7), (41, 70), (2, 3, 65), (1, 1)]


# ---- ops: called by the tests of the other backends too ------------------------------------------
def check_flags() -> None:
    """A scale is divided out; a found infinity leaves what is kept as it is, to the bit."""
    for name in ("muon_prologue_", "decayed_update_", "adamw_step_"):
        for mix in ("float32", "half-weights"):
            arguments = mapped(make(name, SHAPES, MIXES[mix]), signed_zero)
            if name != "decayed_update_":
                check_errors(name, arguments | {"grad_scale": torch.tensor(3.0)})
            infinite = mapped(arguments, torch.clone)
            infinite[LISTS[name][1 if name != "muon_prologue_" else 0]][1].fill_(math.inf)
            after = run(OPS[name], name, infinite | {"found_inf": torch.tensor(2.0)})
            for label in set(mutated(name)) - {"updates"}:
                pairs = zip(after[label], arguments[label], strict=True)
                assert all(torch.equal(bits(a), bits(b)) for a, b in pairs), (name, label)
    check_flags_in_parts()


def check_flags_in_parts() -> None:
    """The same of a whole step whose work does not fit one buffer: muon_step_ goes part by part."""
    places = [(steps, "WORK"), (steps, "ACCELERATOR_WORK")]
    if kernel := sys.modules.get("orthonorm.kernels.muon_step"):
        places.append((kernel, "ACCELERATOR_WORK"))
    limits = [getattr(*place) for place in places]
    rates = map(torch.tensor, (0.02, 0.95, 0.1))
    numbers = (*rates, [1.0] * len(SHAPES), [1.5, -0.5, 0.0])
    given = make("muon_prologue_", SHAPES)
    for place in places:
        setattr(*place, 64)
    try:
        assert len(steps.work_parts(given["grads"])) > 1

        def step(grads: list[Tensor], *flags: Tensor) -> list[Tensor]:
            params = [g.clone() for g in given["updates"]]
            momenta = [b.clone() for b in given["momentum_buffers"]]
            OPS["muon_step_"](
                params, grads, momenta, *numbers, [], grad_scale=flags[0], found_inf=flags[1]
            )
            return params + momenta

        scale, fine, infinite = (torch.tensor(x) for x in (4.0, 0.0, 1.0))
        scaled = step([4 * g for g in given["grads"]], scale, fine)
        alone = step(given["grads"], torch.tensor(1.0), fine)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(scaled, alone, strict=True))
        bad = [g.clone() for g in given["grads"]]
        bad[-1].fill_(math.inf)
        before = [*given["updates"], *given["momentum_buffers"]]
        kept = step(bad, scale, infinite)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(kept, before, strict=True))
    finally:
        for place, limit in zip(places, limits, strict=True):
            setattr(*place, limit)


def signed_zero(t: Tensor) -> Tensor:
    if t.dim():
        t.view(-1)[0] = -0.0
    return t


def check_halves(emulated: bool = False) -> None:
    """Weights and mantissas are float32 weights, to the bit, whatever the updates' dtype."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (F32, BF16, F64):
        halves = [
            torch.randn(s, generator=generator).to(BF16) for s in [*SHAPES, (2049, 4), (0, 3)]
        ]
        halves[1] = halves[1].mT.contiguous().mT
        mantissas = [torch.zeros_like(w, dtype=torch.int16) for w in halves]
        halves[0][0, :2] = torch.tensor([0.0, -0.0])  # as one who prunes writes them
        mantissas[0][0, :2] = -5
        whole = [w.float() for w in halves]
        for step in range(2 if emulated else 5):
            updates = [torch.randn(w.shape, generator=generator).to(dtype) for w in whole]
            rates = (torch.tensor(0.01 * step), torch.tensor(0.1))
            given = (updates, *rates, [0.7] * len(whole), None)
            OPS["decayed_update_"](halves, *given, torch.tensor(0.0), mantissas)
            OPS["decayed_update_"](whole, *given)
        for w, m, x in zip(halves, mantissas, whole, strict=True):
            assert torch.equal(bits(joined(w, m)), bits(x))
            assert ((w.float() - x).abs() <= x.abs() * 2.0**-8).all()
    check_halves_of_adamw(SHAPES, emulated)


def test_flags() -> None:
    check_flags()


def test_halves() -> None:
    check_halves()


def test_opcheck() -> None:
    w, m = torch.randn(5, 7).to(BF16), torch.zeros(5, 7, dtype=torch.int16)
    numbers = (torch.tensor(0.1), torch.tensor(0.1), [1.0], None, torch.tensor(0.0))
    torch.library.opcheck(
        OPS["decayed_update_"].overload, ([w], [torch.randn(5, 7)], *numbers, [m])
    )


def test_split_is_nearest_and_exact() -> None:
    """Every float32 of a fine grid of bits: ends of ranges, subnormal, infinite, zeros of both
    signs."""
    pattern = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).to(torch.int32)
    x = torch.cat([pattern.view(F32), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45])])
    w, m = torch.empty(x.shape, dtype=BF16), torch.empty(x.shape, dtype=torch.int16)
    split_(w, m, x)
    real = ~x.isnan()
    assert torch.equal(bits(joined(w, m))[real], bits(x)[real]) and w[~real].isnan().all()
    nearest, tied = x.to(BF16), m == -(2**15)
    assert torch.equal(bits(w)[real & ~tied], bits(nearest)[real & ~tied]) and tied.any()


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"mantissas": [torch.zeros(3, 4)]}, TypeError, r"mantissas\[0\] must be torch.int16"),
        ({"mantissas": [torch.zeros(3, 5, dtype=torch.int16)]}, ValueError, "shape"),
        ({"mantissas": []}, ValueError, "equal lengths"),
        ({"rounding": torch.tensor(1)}, ValueError, "rounding must be None"),
        ({"params": [torch.ones(3, 4)]}, TypeError, r"params\[0\] must be torch.bfloat16"),
        ({"found_inf": torch.zeros(2)}, ValueError, "found_inf must have one element"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {
        "params": [torch.ones(3, 4, dtype=BF16)], "updates": [torch.ones(3, 4)],
        "lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.0), "factors": [1.0],
        "mantissas": [torch.zeros(3, 4, dtype=torch.int16)], **given,
    }  # fmt: skip
    before = arguments["params"][0].clone()
    with pytest.raises(error, match=f"decayed_update_: .*{match}"):
        OPS["decayed_update_"](**arguments)
    assert torch.equal(arguments["params"][0], before)


# ---- optimizers ----------------------------------------------------------------------------------
class HostReads(TorchDispatchMode):
    """Refuses whatever makes a host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._opname not in ("_local_scalar_dense", "item", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


def parameters(dtype: torch.dtype = F32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((12, 7), (7, 12), (2, 9, 9))
    return [nn.Parameter(torch.randn(s, generator=generator).to(BF16).to(dtype)) for s in shapes]


def set_grads(step: int, *lists: list[nn.Parameter], scale: float = 1.0) -> None:
    for params in lists:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            grad = torch.randn(p.shape, generator=generator).to(BF16)
            p.grad = (grad.float() * scale).to(p.dtype)


def numbers(opt: Any) -> list[Tensor]:
    tensors = [p.detach() for group in opt.param_groups for p in group["params"]]
    return tensors + [t for s in opt.state.values() for t in s.values() if isinstance(t, Tensor)]


SERVED = {
    "Muon": (optim.Muon, {}),
    "Muon, heavy ball": (optim.Muon, {"heavy_ball": True, "decay": "cautious"}),
    "NorMuon": (optim.NorMuon, {}),
    "Signum": (optim.Signum, {}),
    "SCALE": (optim.SCALE, {}),
    "AdamW": (optim.AdamW, {}),
}


@pytest.mark.parametrize("name", SERVED)
def test_flags_reach_the_step_unread(name: str) -> None:
    """Three steps, one of them skipped, are two steps; no number is read on the host."""
    make_one, settings = SERVED[name]
    ours, theirs = parameters(), parameters()
    a, b = make_one(ours, fused=True, **settings), make_one(theirs, **settings)
    a = copy.deepcopy(a)  # which keeps what was asked for
    ours = a.param_groups[0]["params"]
    assert a._step_supports_amp_scaling and not b._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for step in range(4):
        if step == 1:
            set_grads(step, ours)
            ours[1].grad.view(-1)[0] = math.inf
            before = [t.clone() for t in numbers(a)]
        else:
            set_grads(step, ours, scale=scaler.get_scale())
            set_grads(step, theirs)
            b.step()
        with HostReads():
            scaler.step(a)
        scaler.update()
        if step == 1:
            same = zip(numbers(a), before, strict=True)
            assert all(torch.equal(bits(x), bits(y)) for x, y in same)
    assert all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


def test_host_reads_are_seen() -> None:
    for read in (float, bool, Tensor.item):
        with pytest.raises(AssertionError), HostReads():
            read(torch.ones(()))


def test_a_first_step_may_be_skipped() -> None:
    params = parameters()
    opt = optim.Muon([{"params": params[:2]}, {"params": params[2:], "rule": "adamw"}], fused=True)
    before = [p.detach().clone() for p in params]
    set_grads(0, params)
    opt.found_inf, opt.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    opt.step()
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))
    assert all((t == 0).all() for s in opt.state.values() for t in s.values())


@pytest.mark.parametrize(
    "opt",
    [
        lambda p: optim.Conda(p, fused=True),
        lambda p: optim.AdaGO(p, fused=True),
        lambda p: optim.ScionLight(p, fused=True),
        lambda p: optim.Muon(p, fused=True, nonfinite="skip"),
        lambda p: optim.Muon(p, fused=True, telemetry=1),
        lambda p: optim.Muon(p, fused=True, constraint="normalize"),
        lambda p: optim.Muon(p, fused=True, state_dtype="8bit"),
        lambda p: optim.Muon(p, fused=True, state_dtype="bfloat16"),
        lambda p: optim.AdamW(p, fused=True, state_dtype="bfloat16"),
        lambda p: optim.Muon(p),
    ],
)
def test_the_scaler_decides_where_the_host_does(opt: Any) -> None:
    assert not opt(parameters())._step_supports_amp_scaling


@pytest.mark.parametrize(
    ("make_one", "settings"),
    [
        (optim.Muon, {}), (optim.Muon, {"decay": "cautious", "heavy_ball": True}),
        (optim.NorMuon, {}), (optim.Shampoo, {}), (optim.SOAP, {}), (optim.AdaMuon, {}),
    ],
)  # fmt: skip
def test_halves_are_float32_weights(make_one: Any, settings: dict[str, Any]) -> None:
    """To the bit, with state in float32, through a state dict; float32 weights beside them too."""
    halves, whole = parameters(BF16), parameters(F32)
    halves[1] = nn.Parameter(halves[1].detach().float())  # of another dtype in the same group
    a = make_one(halves, mantissa=True, weight_decay=0.1, **settings)
    b = make_one(whole, weight_decay=0.1, **settings)
    for step in range(5):
        set_grads(step, halves, whole)
        a.step()
        b.step()
        if step == 2:
            saved = copy.deepcopy(a.state_dict())
            a = make_one(halves, mantissa=True, weight_decay=0.1, **settings)
            a.load_state_dict(saved)
    for p, q in zip(halves, whole, strict=True):
        state = a.state[p]
        p = joined(p.detach(), state["mantissa"]) if p.dtype == BF16 else p
        assert torch.equal(p, q)
        assert all(torch.equal(state[k], v) for k, v in b.state[q].items() if k != "step")
    assert "mantissa" not in a.state[halves[1]]


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}, {"mantissa": True}])
def test_loading_keeps_halves_where_they_are_asked_for(settings: dict[str, Any]) -> None:
    """From torch's own Muon, from one without and from one of small state; and back."""
    saved, params = [], [p for p in parameters(BF16) if p.dim() == 2]
    for opt in (optim.Muon(params, **settings), torch.optim.Muon(params)):
        set_grads(0, params)
        opt.step()
        saved.append(opt.state_dict())
    for state in saved:
        opt = optim.Muon(params, mantissa=True)
        opt.load_state_dict(state)
        opt.step()
        assert opt.param_groups[0]["mantissa"] and opt.param_groups[0]["state_dtype"] is None
        assert all(opt.state[p]["mantissa"].dtype == torch.int16 for p in params)
        assert all(opt.state[p]["momentum_buffer"].dtype == F32 for p in params)
        back = optim.Muon(params, **settings)
        back.load_state_dict(opt.state_dict())
        back.step()
        assert all(("mantissa" in back.state[p]) == ("mantissa" in settings) for p in params)


@pytest.mark.parametrize("name", ["SWAN", "SCALE", "Scion", "SteepestDescent", "Muon"])
def test_a_scale_of_no_power_of_two(name: str) -> None:
    """To the bit what the scaler's own unscaling gives: times the inverse, taken in float64."""
    found = []
    for fused in (False, True):
        params = parameters()
        opt = optim.REGISTRY[name](params, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        scaler.scale(torch.zeros(()))  # the scaler is ready once it scaled something
        for step in range(2):
            set_grads(step, params, scale=1000.0)
            scaler.step(opt)
            scaler.update()
        found.append(params)
    assert opt._step_supports_amp_scaling
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_what_follows_the_update_keeps_flags_from_the_step() -> None:
    class Finishing(optim.Muon, abstract=True):
        def finish(self, params: list[Tensor], group: dict[str, Any]) -> None:
            torch._foreach_mul_(params, 0.5)

    assert optim.Muon(parameters(), fused=True)._step_supports_amp_scaling
    assert not Finishing(parameters(), fused=True)._step_supports_amp_scaling
    with pytest.raises(ValueError, match="fused must be given to the optimizer"):
        optim.Muon([{"params": parameters(), "fused": True}])


def test_halves_may_be_skipped() -> None:
    params = parameters(BF16)
    opt = optim.Muon(params, mantissa=True, fused=True)
    set_grads(0, params)
    opt.step()
    before = [t.clone() for t in numbers(opt)]
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(numbers(opt), before, strict=True))


def test_halves_where_they_cannot_be() -> None:
    for cls in (optim.Conda, optim.StiefelAdam):
        with pytest.raises(ValueError, match=f"{cls.__name__}: mantissa must be False"):
            cls(parameters(BF16), mantissa=True)
    with pytest.raises(ValueError, match="Muon: constraint must be None with mantissa=True"):
        optim.Muon(parameters(BF16), mantissa=True, constraint="normalize")


@pytest.mark.parametrize("dtype", [F32, BF16, torch.int32])
def test_a_mantissa_is_int16(dtype: torch.dtype) -> None:
    """Loaded or put in its place by hand: refused, and everything is as it was."""
    params = [p for p in parameters(BF16) if p.dim() == 2]
    opt = optim.Muon([("first", params[0])], mantissa=True)
    set_grads(0, params)
    opt.step()
    before, kept = params[0].detach().clone(), opt.state[params[0]]["mantissa"]
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["mantissa"] = kept.to(dtype)
    rule = "parameter 'first': state 'mantissa' must be int16, got"
    with pytest.raises(TypeError, match=rule):
        opt.load_state_dict(saved)
    assert opt.state[params[0]]["mantissa"] is kept
    opt.state[params[0]]["mantissa"] = kept.to(dtype)
    with pytest.raises(TypeError, match=rule):
        opt.step()
    assert torch.equal(params[0], before)
