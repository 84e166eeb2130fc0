"""Cases of tests/test_distributed.py: bfloat16 parameters with float32 state, and mantissas."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from distributed_pairs import OPTIMIZERS, counted, pair, parameters, same, set_gradients
from distributed_registry import Context, case, device_mesh, put, raises, whole
from orthonorm import optim
from orthonorm.distributed import comm_report
from orthonorm.ops.rounding import places as offsets
from orthonorm.ops.rounding import stochastic
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

BF16 = torch.bfloat16
FLOAT32: dict[str, Any] = {"state_dtype": "float32"}


@case(2)
def float32_state_is_that_of_one_process(context: Context) -> None:
    """Weights and state, bit for bit: with owners, on rows, and where a stack stays whole."""
    mesh = device_mesh("cpu", (2,))
    for name in OPTIMIZERS:
        for places in ([Shard(0)], [Shard(1)]):
            a, b = pair(name, mesh, places, dtype=BF16, **FLOAT32)
            for step in range(2):
                set_gradients(step, a, b)
                if step == 0:
                    report = comm_report(a)
                    found = counted(a.step)
                    assert found[:2] == (report.sent, report.received), (name, places)
                else:
                    a.step()
                b.step()
            try:
                same(a, b)
            except AssertionError as error:
                raise AssertionError(f"{name}, {places}: {error}") from error
            kinds = {t.dtype for s in a.state.values() for k, t in s.items() if k != "step"}
            assert kinds <= {torch.float32}, (name, kinds)


@case(2)
def float32_state_is_loaded_as_it_was_saved(context: Context) -> None:
    """To the bit, and from an optimizer without; AdamW's too."""
    mesh = device_mesh("cpu", (2,))
    for name in ("NorMuon", "Conda"):
        a, b = pair(name, mesh, [Shard(0)], dtype=BF16, **FLOAT32)
        set_gradients(0, a, b)
        a.step()
        fresh, plain = (pair(name, mesh, [Shard(0)], dtype=BF16, **k)[0] for k in (FLOAT32, {}))
        fresh.load_state_dict(copy.deepcopy(a.state_dict()))
        plain.load_state_dict(copy.deepcopy(a.state_dict()))
        for p, q, r in zip(*map(parameters, (a, fresh, plain)), strict=True):
            for key, t in a.state[p].items():
                if key != "step":
                    assert t.dtype == torch.float32 == fresh.state[q][key].dtype
                    assert torch.equal(t.to_local(), fresh.state[q][key].to_local())
                    kept = torch.float32 if key.startswith(("row_moment", "basis")) else BF16
                    assert plain.state[r][key].dtype == kept
                    assert fresh.state[q][key].placements == t.placements
        set_gradients(1, fresh, b)
        fresh.step()
        plain.load_state_dict(fresh.state_dict())


@case(2)
def weights_are_rounded_stochastically_where_they_lie(context: Context) -> None:
    """Each rank's rows, by the places of its own memory; replicas alike, which is what DDP has."""
    mesh = device_mesh("cpu", (2,))
    for places in ([Shard(0)], [Shard(1)], [Replicate()]):
        torch.manual_seed(0)
        start = [torch.randn(s).to(BF16) for s in ((19, 16), (1, 24), (7, 5))]
        halves, wide = (
            [nn.Parameter(put(t.to(dtype), mesh, places)) for t in start]
            for dtype in (BF16, torch.float32)
        )
        a, b = (
            optim.Muon([{"params": ps[:2]}, {"params": ps[2:], "rule": "adamw"}], lr=1e-2, **kind)
            for ps, kind in ((halves, dict(stochastic_rounding=True, **FLOAT32)), (wide, {}))
        )
        for step in range(2):
            for p, q in zip(halves, wide, strict=True):
                with torch.no_grad():
                    q.to_local().copy_(p.to_local())
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(BF16)
                p.grad, q.grad = (put(grad.to(w.dtype), mesh, places) for w in (p, q))
            a.step()
            b.step()
            for p, q in zip(halves, wide, strict=True):
                mine, exact = p.detach().to_local(), q.detach().to_local()
                want = stochastic(exact, torch.tensor(step), offsets(exact)).to(BF16)
                assert torch.equal(mine, want), (places, p.shape)


@case(2)
def ranks_agree_on_the_dtype_of_state(context: Context) -> None:
    kind = "float32" if context.rank else None
    mesh = device_mesh("cpu", (2,))
    p = nn.Parameter(put(torch.ones(8, 6, dtype=BF16), mesh, [Shard(0)]))
    opt = optim.Muon([("w", p)], state_dtype=kind)
    p.grad = put(torch.ones(8, 6, dtype=BF16), mesh, [Shard(0)])
    raises(opt.step, "same parameters in the same order", "state_dtype", "'w'")
    assert not opt.state and torch.equal(p.to_local(), torch.ones_like(p.to_local()))


@case(2)
def mantissas_of_adamw_are_those_of_one_process(context: Context) -> None:
    """Weights, mantissas and state, bit for bit; saved and loaded; an uneven cut, an empty one."""
    mesh = device_mesh("cpu", (2,))
    shapes = ((19, 16), (16,), (3,), (1, 5), (4, 6, 5))
    for places in ([Shard(0)], [Replicate()]):
        torch.manual_seed(0)
        plain = [nn.Parameter(torch.randn(s).to(BF16)) for s in shapes]
        plain[2] = nn.Parameter(plain[2].detach().float())
        ours = [nn.Parameter(put(p.detach().clone(), mesh, places)) for p in plain]
        a, b = (optim.AdamW(ps, lr=1e-3, mantissa=True) for ps in (ours, plain))
        for step in range(4):
            set_gradients(step, a, b)
            a.step()
            b.step()
            if step == 1:
                saved = copy.deepcopy(a.state_dict())
                a = optim.AdamW(ours, lr=1e-3, mantissa=True)
                a.load_state_dict(saved)
        same(a, b)
        assert [("mantissa" in a.state[p]) for p in ours] == [True, True, False, True, True]
        assert any(bool(a.state[p]["mantissa"].to_local().any()) for p in ours[:2])


@case(2)
def mantissas_under_fsdp(context: Context) -> None:
    """A model of bfloat16 under FSDP2: AdamW's steps are those of float32 weights; a checkpoint by
    torch's own functions has mantissas and float32 state to the bit."""
    mesh = device_mesh("cpu", (2,))
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Embedding(19, 8), nn.LayerNorm(8), nn.Linear(8, 19)).to(BF16)
    model = copy.deepcopy(alone)
    fully_shard(model, mesh=mesh)
    opt = optim.AdamW(model.parameters(), lr=1e-3, mantissa=True)
    twin = optim.AdamW(alone.parameters(), lr=1e-3, mantissa=True)
    x = torch.arange(19)

    def steps(count: int) -> None:
        for _ in range(count):
            for net, some in ((model, opt), (alone, twin)):
                some.zero_grad()
                net(x).float().square().mean().backward()
                some.step()

    steps(2)
    weights, state = get_state_dict(model, opt)
    weights, state = copy.deepcopy((weights, state))
    steps(1)
    expected = [whole(p.detach()).clone() for p in model.parameters()]
    fresh = copy.deepcopy(alone)
    fully_shard(fresh, mesh=mesh)
    other = optim.AdamW(fresh.parameters(), lr=1e-3, mantissa=True)
    set_state_dict(fresh, other, model_state_dict=weights, optim_state_dict=state)
    fresh(x).float().square().mean().backward()
    other.step()
    for p, q, want in zip(fresh.parameters(), model.parameters(), expected, strict=True):
        assert torch.equal(whole(p.detach()), want)
        for key in ("mantissa", "exp_avg", "exp_avg_sq"):
            mine, theirs = other.state[p][key], opt.state[q][key]
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine.to_local(), theirs.to_local()), key
    same(opt, twin)
    everything = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, opt, options=everything)
    if context.rank == 0:  # what one process goes on with
        one = copy.deepcopy(alone)
        last = optim.AdamW(one.parameters(), lr=1e-3, mantissa=True)
        set_state_dict(one, last, model_state_dict=weights, optim_state_dict=state)
        for p, q in zip(one.parameters(), alone.parameters(), strict=True):
            assert torch.equal(p, q) and last.state[p]["mantissa"].dtype == torch.int16
            assert all(torch.equal(last.state[p][k], t) for k, t in twin.state[q].items())
    dist.barrier()


@case(2)
def matrices_that_are_sharded_have_no_mantissas(context: Context) -> None:
    """The rule is refused, its companion alone is not."""
    mesh = device_mesh("cpu", (2,))
    matrix, gain = (
        nn.Parameter(put(torch.ones(s, dtype=BF16), mesh, [Shard(0)])) for s in ((8, 6), (8,))
    )
    groups = [{"params": [("w", matrix)]}, {"params": [("g", gain)], "rule": "adamw"}]
    words = ("mantissa must be False", "sharded parameters", "'w'")
    raises(lambda: optim.Muon([dict(g) for g in groups], mantissa=True), *words)
    opt = optim.Muon([dict(g) for g in groups], adamw={"mantissa": True, "lr": 1e-3})
    for p in (matrix, gain):
        p.grad = put(torch.ones(p.shape, dtype=BF16), mesh, [Shard(0)])
    opt.step()
    assert "mantissa" in opt.state[gain] and "mantissa" not in opt.state[matrix]
