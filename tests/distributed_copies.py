"""Cases of tests/test_distributed.py: ranks that hold copies and share the work of their steps,
against copies that do not, bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from distributed_layouts import LAYOUTS, ddp, models, train
from distributed_pairs import GATHER, OPTIMIZERS, SHAPES, counted, parameters, same
from distributed_registry import Context, case, device_mesh, put, raises
from orthonorm import optim
from orthonorm.distributed import comm_report, plan, shards, share_work
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

SELF_CONTAINED = [name for name, (cls, _) in OPTIMIZERS.items() if cls.self_contained]
LOCAL = ("Signum", "AuON", "SCALE")  # computed on every rank: single passes


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """With names; one parameter of two matrices, one of eight heads."""
    *some, fused, heads = [(f"w{i}", p) for i, p in enumerate(params)]
    return [
        {"params": some}, {"params": [fused], "split": (16, 14), "heads": (2, 1)},
        {"params": [heads], "heads": 8},
    ]  # fmt: skip


def twins(
    name: str, dtype: Any = torch.float32, group: Any = None, **settings: Any
) -> tuple[Any, Any]:
    """The same optimizer on equal parameters, the first one's work shared."""
    cls, kwargs = OPTIMIZERS[name]
    torch.manual_seed(0)
    start = [torch.randn(s).to(dtype) for s in (*SHAPES, (30, 8), (40, 6))]
    a, b = (
        cls(groups_of([nn.Parameter(t.clone()) for t in start]), **kwargs | settings)
        for _ in range(2)
    )
    share_work(a, group)
    return a, b


def set_gradients(step: int, *opts: Any, scale: float = 1.0) -> None:
    for opt in opts:
        torch.manual_seed(100 + step)
        for p in parameters(opt):
            p.grad = (torch.randn(p.shape) * scale).to(p.dtype)


def step_both(step: int, a: Any, b: Any) -> None:
    set_gradients(step, a, b)
    a.step()
    b.step()
    same(a, b)


def add_optimizer(name: str) -> None:
    def body(context: Context) -> None:
        a, b = twins(name)
        for step in range(3):
            step_both(step, a, b)
        assert (comm_report(a).gathers > 0) == (name not in LOCAL)

    case(*((2, 4) if name in ("Muon", "NorMuon", "Scion") else (2,)), name=f"shared_{name}")(body)


for _name in SELF_CONTAINED:
    add_optimizer(_name)


@case(2)
def shared_steps_of_other_dtypes_have_equal_bits(context: Context) -> None:
    for name in SELF_CONTAINED:
        for dtype, settings in (
            (torch.bfloat16, {}), (torch.bfloat16, {"mantissa": True}),
            (torch.float16, {}), (torch.float64, {}),
        ):  # fmt: skip
            if settings and OPTIMIZERS[name][1].get("constraint"):
                continue  # which keep no mantissas
            a, b = twins(name, dtype, **settings)
            for step in range(2):
                step_both(step, a, b)


@case(2, 4)
def predicted_bytes_of_shared_work_are_the_counted_ones(context: Context) -> None:
    for name in ("Muon", "NorMuon", "AdaMuon, factored"):
        for rule in ("propagate", "skip"):
            a, _ = twins(name, nonfinite=rule)
            set_gradients(0, a)
            report = comm_report(a)
            assert counted(a.step) == (report.sent, report.received, report.launches, 0)
            assert report.sent > 0 and report.buckets == 0 and report.gathers == 3
            assert f"{report.gathers} all-gathers" in str(report)
            total = torch.tensor(report.work)
            dist.all_reduce(total)
            assert abs(float(total) - 1) < 1e-6 and report.work < 1
    for other in ("Conda", "Signum"):
        a, _ = twins(other)
        report = comm_report(a)
        assert (report.sent, report.gathers, report.launches) == (0, 0, 1)


@case(2)
def shared_buckets_travel_while_others_compute(context: Context) -> None:
    """As many buckets as there are matrices for each rank; one is under way at every direction but
    the first."""
    log, kept, limit = list[str](), getattr(dist, GATHER), shards.buckets

    class Watched(optim.Muon, abstract=True):
        def direction(self, *args: Any) -> Any:
            log.append("compute")
            return super().direction(*args)

    class Logged:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            log.append("wait")
            self.work.wait()

    def gather(*args: Any, **kwargs: Any) -> Logged:
        log.append("start")
        return Logged(kept(*args, **kwargs))

    torch.manual_seed(0)
    start = [torch.randn(24, 16) for _ in range(3 * context.world)]
    a, b = (cls([nn.Parameter(t.clone()) for t in start], fused=True)
            for cls in (Watched, optim.Muon))  # fmt: skip
    share_work(a)
    shards.buckets = lambda *args: plan.buckets(*args, limit=1)
    setattr(dist, GATHER, gather)
    try:
        step_both(0, a, b)
    finally:
        setattr(dist, GATHER, kept)
        shards.buckets = limit
    under_way = [log[:i].count("start") - log[:i].count("wait")
                 for i, event in enumerate(log) if event == "compute"]  # fmt: skip
    assert log.count("start") == log.count("wait") == 3
    assert len(under_way) == 3 and all(under_way[1:]), log


@case(2, 4)
def shared_steps_that_a_scaler_skips_change_nothing(context: Context) -> None:
    for name in ("Muon", "NorMuon", "NorMuon, long", "Scion", "AdaMuon"):
        for fused in (True, False):
            a, b = twins(name, fused=fused)
            scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
            for step, scale in enumerate((64.0, math.inf, 32.0)):
                set_gradients(step, a, b, scale=scale)
                before = [p.detach().clone() for p in parameters(a)]
                for opt, scaler in zip((a, b), scalers, strict=True):
                    scaler.scale(torch.zeros(()))
                    scaler.step(opt)
                    scaler.update()
                same(a, b)
                still = [torch.equal(p, q) for p, q in zip(parameters(a), before, strict=True)]
                assert all(still) if math.isinf(scale) else not any(still)
            assert scalers[0].state_dict() == scalers[1].state_dict()


@case(2, 4)
def what_one_copy_skips_all_skip(context: Context) -> None:
    """Also where gradients differ, which DDP's do not: else ranks would gather other things."""
    for name in ("Muon", "NorMuon", "Scion"):
        a, b = twins(name, nonfinite="skip")
        step_both(0, a, b)
        set_gradients(1, a, b)
        parameters(a)[2].grad[0, 0] = torch.nan if context.rank == 1 else 1.0
        parameters(b)[2].grad[0, 0] = torch.nan
        a.step()
        b.step()
        same(a, b)
        assert a.param_groups[0]["skipped"] == b.param_groups[0]["skipped"] == 1
        step_both(2, a, b)
    a.param_groups[0]["nonfinite"] = "error"
    parameters(a)[2].grad[0, 0] = torch.nan if context.rank == 1 else 1.0
    raises(a.step, "finite", "'w2'")


def unchanged(opt: Any, before: list[Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(parameters(opt), before, strict=True))


@case(2, 4)
def copies_that_disagree_all_raise_before_anything_is_written(context: Context) -> None:
    odd, me = context.rank == 1, f"this is rank {context.rank}"
    params = [(n, nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0))))
              for n in "abc"]  # fmt: skip
    before = [p.detach().clone() for _, p in params]
    for _, p in params:
        p.grad = torch.ones_like(p)

    def sharing(order: tuple[int, ...] = (0, 1, 2)) -> Any:
        opt = optim.Muon([params[i] for i in order])
        share_work(opt)
        return opt

    raises(sharing((0, 2, 1) if odd else (0, 1, 2)).step, "'b'", "'c'", "rank 0", "rank 1", me)
    opt = sharing()
    if odd:
        params[1][1].grad = None
    raises(opt.step, "'b'", "'c'", "on rank 1", me)
    params[1][1].grad = torch.ones(8, 6)
    opt.param_groups[0]["lr"] = -1.0 if odd else 0.1
    raises(opt.step, "Muon", "rank 1 cannot make this step", "lr must be", "-1.0", me)
    opt.param_groups[0].update(lr=0.1, telemetry=3 if odd else 0)  # which it would not share
    raises(opt.step, "'a'", "no further parameter", "rank 1", me)
    assert not opt.state
    unchanged(opt, before)
    opt.param_groups[0]["telemetry"] = 0
    opt.step()  # and goes on where it is mended
    assert not torch.equal(params[0][1], before[0])


@case(2)
def a_rank_that_shares_no_work_is_found(context: Context) -> None:
    opt = optim.Muon([("a", nn.Parameter(torch.ones(8, 6)))])
    parameters(opt)[0].grad = torch.ones(8, 6)
    if context.rank == 0:
        share_work(opt)
    else:
        opt.step()
        dist.barrier()
    words = ("'a' (8, 6)", "shared by ranks [0, 1]", "on rank 0", "a plain tensor on rank 1")
    raises(opt.step, *words, f"this is rank {context.rank}")
    if context.rank == 0:
        dist.barrier()


@case(2)
def state_of_shared_work_is_that_of_one_process(context: Context) -> None:
    for name in ("Muon", "NorMuon", "Scion"):
        a, b = twins(name)
        step_both(0, a, b)
        mine, alone = a.state_dict(), b.state_dict()
        assert mine["param_groups"] == alone["param_groups"]
        for i, named in alone["state"].items():
            assert named.keys() == mine["state"][i].keys()
            assert all(torch.equal(t, mine["state"][i][k]) for k, t in named.items())
        c, d = twins(name)
        with torch.no_grad():
            for p, q, r in zip(*map(parameters, (c, d, b)), strict=True):
                p.copy_(r), q.copy_(r)
        c.load_state_dict(copy.deepcopy(alone))  # one process's, into one that shares
        d.load_state_dict(copy.deepcopy(mine))
        same(c, d)
        step_both(1, c, d)
        assert comm_report(c).gathers and not comm_report(copy.deepcopy(c)).gathers


@case(4)
def some_ranks_share_work_among_them(context: Context) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    a, b = twins("NorMuon", group=pairs[context.rank // 2])
    for step in range(2):
        set_gradients(10 * (context.rank // 2) + step, a, b)
        a.step()
        b.step()
        same(a, b)
    raises(lambda: share_work(a, pairs[1 - context.rank // 2]), "share_work: group must have rank")


@case(2)
def replicated_tensors_share_work_too(context: Context) -> None:
    mesh = device_mesh("cpu", (2,))
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(3, 12, 8), torch.randn(16, 24)]
    a = optim.NorMuon([nn.Parameter(put(t, mesh, [Replicate()])) for t in start])
    b = optim.NorMuon([nn.Parameter(t.clone()) for t in start])
    share_work(a)
    for step in range(2):
        set_gradients(step, b)
        for p, q in zip(parameters(a), parameters(b), strict=True):
            p.grad = put(q.grad, mesh, [Replicate()])
        a.step()
        b.step()
        same(a, b)
    assert comm_report(a).gathers == 1 and comm_report(a).local == 0


@case(2, 4)
def training_under_ddp_shares_work(context: Context) -> None:
    assert ddp in LAYOUTS
    for name in ("Muon", "NorMuon", "Scion", "Conda"):
        model, opt, _, twin = models(ddp, name, context.world)
        share_work(opt)
        train(model, range(3), context.rank, opt, twin)
        same(opt, twin)
