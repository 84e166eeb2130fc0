"""What torch demands of its own optimizers, of every optimizer here: one body per demand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads, snapshot
from orthonorm import optim
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
SHAPES = ((12, 7), (7, 12), (9, 9))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(opt: Any, params: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_grads(step, params)
        opt.step()


@ALL
def test_groups_have_their_own_settings(row: Row) -> None:
    """Two groups of one optimizer are two optimizers."""
    ours, theirs = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    other = {k: 0.3 for k in row.no_decay if k == "weight_decay"} | {"lr": 0.003}
    a = build(row, [{"params": ours[:1]}, {"params": ours[1:], **other}])
    b, c = build(row, theirs[:1]), build(row, theirs[1:], **other)
    for step in range(3):
        set_grads(step, ours, theirs)
        for opt in (a, b, c):
            opt.step()
    assert same(
        snapshot(a), [*snapshot(b)[:1], *snapshot(c)[:2], *snapshot(b)[1:], *snapshot(c)[2:]]
    )


@ALL
def test_maximize_is_minimizing_the_negative(row: Row) -> None:
    ours, theirs = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    a, b = build(row, ours, maximize=True), build(row, theirs)
    for step in range(3):
        set_grads(step, ours, theirs)
        for p in theirs:
            p.grad.neg_()
        a.step()
        b.step()
    assert same(snapshot(a), snapshot(b))


@ALL
def test_the_companion_inherits_nonfinite(row: Row) -> None:
    for policy in ("skip", "error"):
        good, bad = make(torch.float32, ((5,), (5,)))
        opt = build(row, [{"params": [good, bad], "rule": "adamw"}], nonfinite=policy)
        set_grads(0, [good, bad])
        bad.grad[0] = torch.nan
        before = bad.clone()
        if policy == "error":
            with pytest.raises(ValueError, match="gradients must be finite"):
                opt.step()
        else:
            opt.step()
            assert opt.param_groups[0]["skipped"] == 1
        assert torch.equal(bad, before)
        assert good.isfinite().all()


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "Signum"])
def test_a_direction_of_ones_own_is_taken(name: str) -> None:
    """Those whose step is one fused op do not use it for another direction."""

    class Still(getattr(optim, name), abstract=True):  # type: ignore[misc]
        def direction(self, updates: Any, batch: Any, group: Any) -> Any:
            for stack in updates.stacks:
                stack.zero_()
            return updates

    (p,) = make(torch.float32, ((6, 4),))
    opt, before = Still([p], lr=0.1, weight_decay=0.0), p.detach().clone()
    set_grads(0, [p])
    opt.step()
    assert torch.equal(p, before)
    assert opt.state[p]["momentum_buffer"].norm() > 0


@ALL
def test_the_companion_inherits_maximize(row: Row) -> None:
    up, down = make(torch.float32, ((5,),)), make(torch.float32, ((5,),))
    a = build(row, [{"params": up, "rule": "adamw"}], maximize=True)
    b = build(row, [{"params": down, "rule": "adamw"}])
    set_grads(0, up, down)
    down[0].grad.neg_()
    a.step()
    b.step()
    assert same(snapshot(a), snapshot(b))


@ALL
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_and_unscales(row: Row, fused: bool) -> None:
    """By itself, or, where the rule can, by flags that the step reads."""
    ours, theirs = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    a, b = build(row, ours, fused=fused), build(row, theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    run(a, ours, 1)
    run(b, theirs, 1)
    before = snapshot(a)
    set_grads(1, ours)
    ours[1].grad[0, 0] = float("inf")
    scaler.scale(torch.ones(()))
    scaler.step(a)
    scaler.update()
    assert same(before, snapshot(a)) and scaler.get_scale() == 512.0
    set_grads(2, ours, theirs)
    for p in ours:
        p.grad.mul_(512.0)
    scaler.step(a)
    b.step()
    assert same(snapshot(a), snapshot(b))


@ALL
def test_names_and_older_state_dicts(row: Row) -> None:
    """Names are kept; a state dict that lacks what came later takes the constructor's values."""
    params, fresh = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    a = build(row, [(f"layer.{i}", p) for i, p in enumerate(params)])
    b = build(row, [(f"layer.{i}", p) for i, p in enumerate(fresh)])
    run(a, params, 3)
    saved = copy.deepcopy(a.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["layer.0", "layer.1", "layer.2"]
    for key in ("maximize", "nonfinite", "decay", "constraint", "bound", "heavy_ball", "rule"):
        saved["param_groups"][0].pop(key, None)
    b.load_state_dict(saved)
    assert b.param_groups[0]["nonfinite"] == "propagate" and b.state_dict().keys() == saved.keys()
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            q.copy_(p)
    run(a, params, 2, first=3)
    run(b, fresh, 2, first=3)
    assert same(snapshot(a), snapshot(b))


@ALL
def test_state_follows_parameters_to_another_dtype(row: Row) -> None:
    params, fresh = make(torch.float32, SHAPES), make(torch.float64, SHAPES)
    a, b = build(row, params), build(row, fresh)
    run(a, params, 2)
    b.load_state_dict(a.state_dict())
    floating = [v for s in b.state.values() for k, v in s.items() if k != "step"]
    assert all(v.dtype == torch.float64 for v in floating)
    run(b, fresh, 1)
    assert all(p.isfinite().all() for p in fresh)


@ALL
def test_state_follows_parameters_to_another_device(row: Row) -> None:
    """Of a checkpoint read to the CPU, step counts of the companion included."""
    params = make(torch.float32, (*SHAPES, (5,)))
    fresh = [nn.Parameter(p.detach().to("meta")) for p in params]
    a, b = (
        build(row, [{"params": ps[:-1]}, {"params": ps[-1:], "rule": "adamw"}])
        for ps in (params, fresh)
    )
    run(a, params, 1)
    b.load_state_dict(a.state_dict())
    found = [v for s in b.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert len(b.state[fresh[-1]]) == 3 and all(v.is_meta for v in found)


@ALL
def test_pickle_and_repr(row: Row) -> None:
    params = make(torch.float32, SHAPES)
    a = build(row, params)
    run(a, params, 2)
    b = pickle.loads(pickle.dumps(a))
    theirs = b.param_groups[0]["params"]
    for opt, mine in ((a, params), (b, theirs)):
        run(opt, mine, 2, first=2)
    assert same(snapshot(a), snapshot(b))
    assert repr(a).startswith(row.name) and f"lr: {row.kwargs['lr']}" in repr(a)


@ALL
def test_hooks(row: Row) -> None:
    params = make(torch.float32, SHAPES)
    opt, seen = build(row, params), []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    run(opt, params, 1)
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", "after", "saved", "loaded"]


@ALL
def test_schedulers_of_every_kind(row: Row) -> None:
    """They set lr, or momentum and betas, between steps; the step reads them anew."""
    params = make(torch.float32, SHAPES)
    opt = build(row, params)
    cycle = "momentum" in opt.param_groups[0] or "betas" in opt.param_groups[0]
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=4, cycle_momentum=cycle),
        torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    ]
    for step in range(4):
        set_grads(step, params)
        opt.step()
        if step < 3:
            schedulers[0].step()
        schedulers[1].step(1.0)
    assert all(p.isfinite().all() for p in params)


@ALL
def test_state_bytes(row: Row) -> None:
    m, n = 12, 7
    params = make(torch.float32, ((m, n),))
    opt = build(row, params, **({"max_precond_dim": 10000} if row.name == "Shampoo" else {}))
    run(opt, params, 1)
    tensors = [v for v in opt.state[params[0]].values() if isinstance(v, Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 4 * row.state(m, n)


class Calls(TorchDispatchMode):
    """Counts what is computed: op calls that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@ALL
def test_op_calls_grow_with_groups_not_parameters(row: Row) -> None:
    counts = []
    for repeats in (2, 20):
        params = make(torch.float32, SHAPES * repeats)
        opt = build(row, params)
        run(opt, params, 2)
        set_grads(2, params)
        with Calls() as calls:
            opt.step()
        counts.append(calls.count)
    assert counts[0] == counts[1] > 0, counts


# ---- options of the base -------------------------------------------------------------------------
MATRIX = [r for r in ROWS if r.name != "AdamW"]


@pytest.mark.parametrize("row", MATRIX, ids=lambda r: r.name)
@pytest.mark.parametrize("kind", ["normalize", "cap", "stiefel"])
def test_constraints_bound_singular_values(row: Row, kind: str) -> None:
    params = make(torch.float64, SHAPES)
    opt = build(row, params, constraint=kind, bound=0.5)
    run(opt, params, 2)
    for p in params:
        s = 0.5 * (p.shape[0] / p.shape[1]) ** 0.5
        values = torch.linalg.svdvals(p.detach())
        lower_bound = 1e-2 if kind == "normalize" else 1e-10  # of sigma_1, by 16 power steps
        assert values.max() <= s * (1 + lower_bound)
        assert kind != "stiefel" or values.min() >= s * (1 - 1e-10)


def test_a_cap_leaves_smaller_singular_values() -> None:
    for shape in SHAPES:
        W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        p = nn.Parameter(W.clone())
        opt = optim.Signum([p], lr=0.0, weight_decay=0.0, constraint="cap", bound=2.0)
        p.grad = torch.ones_like(p)
        opt.step()
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        want = (U * S.clamp(max=2.0 * (shape[0] / shape[1]) ** 0.5)) @ V
        torch.testing.assert_close(p.detach(), want, atol=1e-12, rtol=0)


def test_adamw_takes_the_groups_of_a_model() -> None:
    """Its own rule whatever a group names: one line changes the optimizer, not the groups."""
    models = [nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    views = {"0.weight": (2, 4)}
    opts = [optim.AdamW(optim.split_params(models[0], split=views)),
            optim.AdamW(models[1].parameters())]  # fmt: skip
    assert [g["rule"] for g in opts[0].param_groups] == ["adamw"] * len(opts[0].param_groups)
    for model, opt in zip(models, opts, strict=True):
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            opt.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    opts[0].param_groups[0]["rule"] = "matrix"
    with pytest.raises(ValueError, match="AdamW: rule must be 'adamw', got 'matrix'"):
        opts[0].step()


def test_changed_settings_are_checked_at_the_next_step() -> None:
    """Also of a list that changed in place, and again once they are back in order."""
    (p,) = make(torch.float32, ((3, 2),))
    opt = optim.AdamW([p], betas=[0.9, 0.99])
    group = opt.param_groups[0]
    set_grads(0, [p])
    for key, good, bad in (("lr", 0.1, -0.1), ("eps", 1e-8, -1.0), ("weight_decay", 0.0, None)):
        opt.step()
        group[key] = bad
        with pytest.raises((ValueError, TypeError), match=key):
            opt.step()
        group[key] = good
    opt.step()
    group["betas"][1] = 1.5
    with pytest.raises(ValueError, match="betas"):
        opt.step()


def test_groups_of_another_optimizer_are_taken() -> None:
    """With what steps add to them; seeds of rounding, which count steps, are the new one's own."""
    params = make(torch.bfloat16, ((3, 2), (4, 4)))
    old = optim.Muon(params, nonfinite="skip", stochastic_rounding=True)
    set_grads(0, params)
    params[0].grad[0, 0] = float("nan")
    old.step()
    new = optim.Muon(old.param_groups)
    assert new.param_groups[0]["skipped"] == 1
    new.step()
    assert [int(opt.param_groups[0]["rounding_seed"]) for opt in (old, new)] == [1, 2]
