"""What a step tells of itself, against formulas in float64, at no change of what it does."""

from __future__ import annotations

import math
from typing import Any

import orthonorm
import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads, snapshot
from orthonorm import optim
from test_optimizer_contract import Calls
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = ((12, 7), (7, 12), (3, 9, 8))
ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


def total(tensors: list[Tensor]) -> float:
    """The norm of all entries together."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


@ALL
def test_measuring_changes_nothing_and_tells_the_norms(row: Row) -> None:
    ours, plain = make(torch.float64, SHAPES), make(torch.float64, SHAPES)
    a, b = build(row, ours, telemetry=1, **row.no_decay), build(row, plain, **row.no_decay)
    for step in range(3):
        set_grads(step, ours, plain)
        before = [p.detach().clone() for p in ours]
        gradient = total([p.grad for p in ours])
        a.step()
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(snapshot(a), snapshot(b), strict=True))
    (told,) = a.telemetry()
    assert told["skipped"] == 0 and b.telemetry() == [{}]
    assert told["gradient_norm"] == pytest.approx(gradient, rel=1e-12)
    if "update_rms" in told:
        moved = [q - p.detach() for p, q in zip(ours, before, strict=True)]
        entries = sum(p.numel() for p in ours)
        assert told["update_rms"] == pytest.approx(total(moved) / math.sqrt(entries), rel=1e-9)
    assert ("update_rms" in told) == (row.name not in ("AdamW", "Conda", "StiefelAdam"))
    if "sigma_1" in told:
        assert 1 <= told["stable_rank"] <= 9
        assert told["sigma_1"] <= told["momentum_norm"]


@pytest.mark.parametrize("rescale", [1.0, 1e-30])
def test_muon_tells_spectral_measures_of_its_momentum(rescale: float) -> None:
    params = make(torch.float32, SHAPES)
    opt = optim.Muon(params, lr=0.02, weight_decay=0.0, ns_coefficients="polar_express",
                     ns_steps=None, precision="full", telemetry=2)  # fmt: skip
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for _ in range(9):
        set_grads(0, params)
        for i, p in enumerate(params):
            p.grad.mul_(rescale)
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad.double()
        opt.step()
    told = opt.telemetry()[0]
    updates = [0.95 * m + 0.05 * p.grad.double() for m, p in zip(momenta, params, strict=True)]
    sigmas = torch.cat([torch.linalg.svdvals(u).reshape(-1, min(u.shape[-2:])).max(-1).values
                        for u in updates])  # fmt: skip
    sizes = torch.cat([u.square().sum((-2, -1)).sqrt().reshape(-1) for u in updates])
    polars = [orthonorm.polar(u, "polar_express", precision="full") for u in updates]
    nuclear = sum(float((u * x).sum()) for u, x in zip(updates, polars, strict=True))
    assert told["momentum_norm"] == pytest.approx(total(updates), rel=1e-6)
    assert told["sigma_1"] == pytest.approx(float(sigmas.max()), rel=1e-3)
    ranks = (sizes / sigmas).square()
    assert told["stable_rank"] == pytest.approx(float(ranks.mean()), rel=1e-2)
    assert told["nuclear_norm"] == pytest.approx(nuclear, rel=1e-5)


def test_a_search_among_polar_factors_tells_the_nuclear_norm_of_its_update_alone() -> None:
    (p,) = params = make(torch.float64, SHAPES[:1])
    opt = optim.SSO(params, lr=0.01, momentum=0.0, precision="full", telemetry=1)
    set_grads(0, params)
    assert p.grad is not None
    X = p.grad / p.grad.norm()
    opt.step()
    nuclear = float((X * orthonorm.polar(X, "polar_express", precision="full")).sum())
    assert opt.telemetry()[0]["nuclear_norm"] == pytest.approx(nuclear, rel=1e-5)


def test_the_companion_tells_its_norms() -> None:
    params, gains = make(torch.float32, SHAPES), make(torch.float32, ((5,), (2, 3)))
    groups: list[dict[str, Any]] = [{"params": params}, {"params": gains, "rule": "adamw"}]
    opt = optim.Muon(groups, lr=0.02, telemetry=1)
    set_grads(0, params)
    set_grads(1, gains)
    opt.step()
    told = opt.telemetry()[1]
    assert told["gradient_norm"] == pytest.approx(total([p.grad for p in gains]), rel=1e-6)
    momenta = [opt.state[p]["exp_avg"] for p in gains]
    assert told["momentum_norm"] == pytest.approx(total(momenta), rel=1e-6)


def test_every_so_many_steps() -> None:
    params = make(torch.float32, SHAPES)
    opt = optim.NorMuon(params, lr=0.02, telemetry=3)
    told = []
    for step in range(5):
        set_grads(step, params)
        opt.step()
        told.append(opt.telemetry()[0]["gradient_norm"])
    assert told[0] == told[1] == told[2] != told[3] == told[4]
    again = optim.NorMuon(make(torch.float32, SHAPES), lr=0.02)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["telemetry"] == 3 and again.telemetry() == [{}]


def test_a_scheduled_rate_does_not_change_what_was_told() -> None:
    params, rate = make(torch.float32, SHAPES), torch.tensor(0.02)
    opt = optim.Muon(params, lr=rate, telemetry=1)
    set_grads(0, params)
    opt.step()
    told = opt.telemetry()
    rate.fill_(1.0)
    assert opt.telemetry() == told


def test_skipped_updates_are_a_share_of_those_asked_for() -> None:
    params = make(torch.float32, SHAPES)
    opt = optim.Muon(params, lr=0.02, telemetry=1, nonfinite="skip")
    for step in range(4):
        set_grads(step, params)
        if step % 2:
            params[0].grad[0, 0] = math.nan
        opt.step()
    assert opt.telemetry()[0]["skipped"] == pytest.approx(2 / 12)
    finite = opt.telemetry()[0]["momentum_norm"]
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    opt.step()  # updates nothing, so measures nothing
    assert opt.telemetry()[0] | {"skipped": 5 / 15} == opt.telemetry()[0]
    assert opt.telemetry()[0]["momentum_norm"] == finite


class Reads(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["Muon", "SCALE", "Conda"])
def test_a_step_reads_nothing_from_the_device(name: str) -> None:
    params = make(torch.float32, SHAPES)
    opt = optim.REGISTRY[name](params, lr=0.02, telemetry=1)
    for step in range(2):
        set_grads(step, params)
        with Reads() as reads:
            opt.step()
    assert reads.count == 0


def test_op_calls_grow_with_shapes_not_parameters() -> None:
    counts = []
    for repeats in (1, 20):
        params: list[nn.Parameter] = make(torch.float32, SHAPES * repeats)
        opt = optim.Muon(params, lr=0.02, telemetry=1)
        for step in range(2):
            set_grads(step, params)
            with Calls() as calls:
                opt.step()
        counts.append(calls.count)
    assert counts[0] == counts[1] > 0


def test_a_compiled_step_measures_nothing_and_is_one_graph() -> None:
    torch._dynamo.reset()
    params, plain = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    opt, eager = (optim.Muon(x, lr=0.02, telemetry=1) for x in (params, plain))
    step = torch.compile(opt.step, fullgraph=True, backend="eager")
    for i in range(3):
        set_grads(i, params, plain)
        step()
        eager.step()
    assert opt.telemetry() == [{}]
    assert all(torch.equal(x, y) for x, y in zip(snapshot(opt), snapshot(eager), strict=True))


@pytest.mark.parametrize("value", [-1, 1.5, None])
def test_what_telemetry_may_be(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="telemetry"):
        optim.Muon(make(torch.float32, SHAPES), lr=0.02, telemetry=value)
