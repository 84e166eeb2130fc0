"""Cases of tests/test_distributed.py: what one rank gets wrong, all report before they write."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed_pairs import counted, parameters, same, set_gradients
from distributed_registry import Context, case, device_mesh, put, raises
from orthonorm import optim
from orthonorm.distributed import comm_report, meeting
from orthonorm.optim.tensors import local
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def named(mesh: Any, places: list[Any], names: str, shape: Any = (8, 6)) -> list[Any]:
    return [(n, nn.Parameter(put(torch.randn(shape), mesh, places))) for n in names]


def give_gradients(opt: Any) -> list[Tensor]:
    params = [p for g in opt.param_groups for p in g["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    return [p.to_local().clone() for p in params]


def unchanged(opt: Any, before: list[Tensor]) -> None:
    params = [p for g in opt.param_groups for p in g["params"]]
    assert all(torch.equal(p.to_local(), q) for p, q in zip(params, before, strict=True))


@case(2, 4)
def ranks_that_disagree_all_raise_before_anything_is_written(context: Context) -> None:
    mesh, odd = device_mesh("cpu", (context.world,)), context.rank == 1
    params = named(mesh, [Shard(0)], "abc")
    swapped = [params[i] for i in ((0, 2, 1) if odd else (0, 1, 2))]
    opt = optim.Muon(swapped)
    before = give_gradients(opt)
    raises(opt.step, "'b'", "'c'", "rank 0", "rank 1", f"this is rank {context.rank}")
    unchanged(opt, before)

    opt = optim.Muon(named(mesh, [Shard(0)], "a"))
    give_gradients(opt)
    opt.step()
    late = named(mesh, [Shard(0)], "z")
    if odd:
        opt.add_param_group({"params": late})
    before = give_gradients(opt)
    waited, meeting.FIRST = meeting.FIRST, 0.5  # for the others, who have met
    raises(opt.step, "'z'", "rank 1", "no further parameter", f"this is rank {context.rank}")
    meeting.FIRST = waited
    unchanged(opt, before)

    without = optim.Muon(params)
    before = give_gradients(without)
    if odd:
        params[1][1].grad = None
    raises(without.step, "'b'", "'c'", "rank 1")
    unchanged(without, before)
    give_gradients(opt := optim.Muon(params, method="gram" if odd else "auto"))
    raises(opt.step, "'a'", "'method': 'gram'", "rank 1")


@case(4)
def mismatched_meshes_raise(context: Context) -> None:
    """Also those of which collectives would wait for each other: other ranks, or none needed."""
    flat, square = device_mesh("cpu", (4,)), device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    rows, odd, me = [Shard(0)], context.rank == 1, f"this is rank {context.rank}"
    for mesh, places, *words in (
        (square, [Replicate(), Shard(0)], "[[0, 1], [2, 3]]"),
        (square["b"], rows, "mesh [0, 1],"),
        (flat, [Replicate()], "Replicate()"),
    ):
        for cls, shape in ((optim.Muon, (8, 6)), (optim.Conda, (4, 6, 5))):
            whole = named(flat, rows, "w", (4, 6, 5))
            mine = named(mesh, places, "a", shape) if odd else named(flat, [Shard(-1)], "a", shape)
            opt = cls(whole + mine)
            before = give_gradients(opt)
            raises(opt.step, "'a'", *words, "(Shard(dim=1),)" if len(shape) == 2 else "Shard",
                   "mesh [0, 1, 2, 3]", "on rank 0", "on rank 1", me)  # fmt: skip
            unchanged(opt, before)
            assert not opt.state


@case(2, 4)
def late_parameters_that_ranks_place_otherwise_raise(context: Context) -> None:
    """Though none of those before them had anything to exchange."""
    mesh, odd = device_mesh("cpu", (context.world,)), context.rank == 1
    opt = optim.Muon(named(mesh, [Replicate()], "ab"))
    give_gradients(opt)
    opt.step()
    opt.add_param_group({"params": named(mesh, [Replicate() if odd else Shard(0)], "z")})
    before = give_gradients(opt)
    raises(opt.step, "'z'", "Replicate", "Shard", "on rank 1", f"this is rank {context.rank}")
    unchanged(opt, before)


@case(2, 4)
def a_rank_of_plain_tensors_raises_with_the_others(context: Context) -> None:
    """It shares nothing and waits for no one: it hears of it at its next step."""
    mesh, odd = device_mesh("cpu", (context.world,)), context.rank == 1
    params = named(mesh, [Shard(0)], "ab")
    plain = [(name, nn.Parameter(p.detach().full_tensor())) for name, p in params]
    opt = optim.Muon(plain if odd else params)
    for p in parameters(opt):
        p.grad = torch.ones_like(p)
    if odd:
        opt.step()
        dist.barrier()
    before = [local(p).clone() for p in parameters(opt)]
    raises(opt.step, "'a' (8, 6)", "Shard(dim=0)", "on rank 0", "a plain tensor on rank 1",
           f"this is rank {context.rank}")  # fmt: skip
    if not odd:
        dist.barrier()
    assert all(torch.equal(local(p), q) for p, q in zip(parameters(opt), before, strict=True))


@case(2)
def ranks_of_which_one_holds_a_plain_tensor_more_raise(context: Context) -> None:
    mesh, odd = device_mesh("cpu", (2,)), context.rank == 1
    params = named(mesh, [Shard(0)], "abc")
    if odd:
        params[1] = ("b", nn.Parameter(torch.randn(8, 6)))
    opt = optim.Muon(params)
    for p in parameters(opt):
        p.grad = torch.ones_like(p)
    waited, meeting.FIRST = meeting.FIRST, 0.5
    raises(opt.step, "'b' (8, 6)", "Shard(dim=0)", "on rank 0", "'c'", "on rank 1",
           f"this is rank {context.rank}")  # fmt: skip
    meeting.FIRST = waited
    assert not opt.state


@case(2)
def optimizers_of_one_rank_are_no_disagreement(context: Context) -> None:
    """It waits for the other a while, and both agree on what they share after it."""
    square, flat = device_mesh("cpu", (2, 1), mesh_dim_names=("x", "y")), device_mesh("cpu", (2,))
    waited, meeting.FIRST = meeting.FIRST, 0.2
    for mesh, name in ((square["y"], "c"), (flat, "d")) if context.rank == 1 else ():
        alone = optim.Muon(named(mesh, [Replicate()], name))
        before = give_gradients(alone)
        alone.step()
        assert not torch.equal(parameters(alone)[0].to_local(), before[0])
    meeting.FIRST = waited
    opt = optim.Muon(named(flat, [Shard(0)], "a"))
    before = give_gradients(opt)
    opt.step()
    assert not torch.equal(parameters(opt)[0].to_local(), before[0])


@case(2)
def a_gradient_placed_otherwise_is_refused(context: Context) -> None:
    mesh = device_mesh("cpu", (2,))
    rows = named(mesh, [Shard(0)], "w")
    opt = optim.Muon(rows)
    rows[0][1].grad = put(torch.ones(8, 6), mesh, [Replicate()])
    raises(opt.step, "'w'", "placed as its parameter")


@case(2)
def what_one_owner_raises_all_raise(context: Context) -> None:
    class Failing(optim.Conda):
        def prepare(self, batch: Any, group: dict[str, Any]) -> Any:
            if dist.get_rank() == 1:
                raise ArithmeticError("no basis")
            return super().prepare(batch, group)

    opt = Failing(named(device_mesh("cpu", (2,)), [Shard(0)], "ab"))
    before = give_gradients(opt)
    raises(opt.step, "Failing", "rank 1 could not", f"this is rank {context.rank}", "no basis")
    unchanged(opt, before)
    assert all("step" not in opt.state[p] for p in parameters(opt))


@case(2)
def a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(context: Context) -> None:
    mesh = device_mesh("cpu", (2,))
    opt = optim.Muon(named(mesh, [Shard(0)], "ab"), nonfinite="skip")
    before = give_gradients(opt)
    first, second = opt.param_groups[0]["params"]
    if context.rank == 1:
        first.grad.to_local()[0, 0] = torch.nan
    opt.step()
    assert opt.param_groups[0]["skipped"] == 1
    assert torch.equal(first.to_local(), before[0]) and not torch.equal(
        second.to_local(), before[1]
    )
    opt.param_groups[0]["nonfinite"] = "error"
    raises(opt.step, "'a'", "finite")


@case(2, 4)
def what_one_rank_refuses_all_report(context: Context) -> None:
    """A setting, a gradient, state that was replaced: by name, and on the rank that refuses it."""
    mesh, odd = device_mesh("cpu", (context.world,)), context.rank == 1
    me = f"this is rank {context.rank}"

    def ready(cls: Any = optim.Muon, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        opt = cls(named(mesh, [Shard(0)], "ab"), **kwargs)
        return opt, give_gradients(opt)

    opt, before = ready()
    if odd:
        opt.param_groups[0]["lr"] = -1.0
    raises(opt.step, "Muon", "rank 1 cannot make this step", "lr must be", "-1.0", me)
    unchanged(opt, before)
    opt.param_groups[0]["lr"] = 0.1
    opt.step()  # and goes on where it is mended

    opt, before = ready(optim.NorMuon)
    b = parameters(opt)[1]
    if odd:
        b.grad = put(torch.ones(8, 6), mesh, [Replicate()])
    raises(opt.step, "rank 1 cannot", "placed as its parameter", "'b'", me)
    unchanged(opt, before)

    opt, _ = ready(optim.Conda)
    opt.step()
    before, b = give_gradients(opt), parameters(opt)[1]
    if odd:
        opt.state[b]["exp_avg"] = torch.zeros(3)
    raises(opt.step, "rank 1 cannot", "'b'", "state 'exp_avg'", me)
    unchanged(opt, before)

    opt, before = ready()
    opt.param_groups[0]["momentum"] = 2.0  # on all: each says what it has found
    raises(opt.step, "momentum must be", "got 2.0")
    unchanged(opt, before)


@case(2)
def what_one_ranks_experts_raise_all_raise(context: Context) -> None:
    """Else the others would wait for the matrices that they share with it."""
    mesh = device_mesh("cpu", (2,))
    expert, cut = named(mesh, [Shard(0)], "e", (4, 6, 5)), named(mesh, [Shard(0)], "w")

    class Failing(optim.Conda):
        def prepare(self, batch: Any, group: dict[str, Any]) -> Any:
            if context.rank == 1 and batch.params[0].shape[-2:] == (6, 5):
                raise ArithmeticError("no basis of an expert")
            return super().prepare(batch, group)

    opt = Failing(expert + cut)
    before = give_gradients(opt)
    raises(opt.step, "rank 1 could not", f"this is rank {context.rank}", "no basis of an expert")
    unchanged(opt, before)
    assert not opt.state


@case(2)
def the_gather_of_experts_is_counted(context: Context) -> None:
    mesh = device_mesh("cpu", (2,))
    params = [*named(mesh, [Shard(0)], "e", (4, 6, 5)), *named(mesh, [Shard(0)], "w")]
    for cls, launches in ((optim.Conda, 5), (optim.Muon, 3)):
        opt = cls(params)
        give_gradients(opt)
        report = comm_report(opt)
        assert counted(opt.step) == (report.sent, report.received, report.launches, 0)
        assert (report.launches, report.local) == (launches, 1)


@case(2, 4)
def ranks_that_place_a_parameter_otherwise_all_raise(context: Context) -> None:
    mesh, odd = device_mesh("cpu", (context.world,)), context.rank == 1
    opt = optim.Muon([*named(mesh, [Shard(0)], "a"), *named(mesh, [Shard(odd * 1)], "b")])
    before = give_gradients(opt)
    raises(opt.step, "'b'", "Shard(dim=0)", "Shard(dim=1)", "rank 1", f"is rank {context.rank}")
    unchanged(opt, before)


@case(4)
def placements_that_cannot_be_updated_are_refused(context: Context) -> None:
    flat, mine = device_mesh("cpu", (4,)), 3 if context.rank == 0 else 1
    uneven = DTensor.from_local(torch.ones(mine, 6), flat, [Shard(0)], run_check=False,
                                shape=(6, 6), stride=(6, 1))  # fmt: skip
    partial = DTensor.from_local(torch.ones(8, 6), flat, [Partial()], run_check=False)
    for t, *words in (
        (partial, "must be replicated or sharded", "Partial"),
        (uneven, "must be cut as torch.chunk does", f"(2, 6) on rank {context.rank}", f"({mine},"),
    ):
        if context.rank == 3 and t is uneven:
            continue  # which has its part by either rule
        raises(lambda t=t: optim.Muon([("w", nn.Parameter(t))]), "'w'", *words)


@case(2)
def what_sharded_parameters_cannot_have_is_refused(context: Context) -> None:
    """At once, and before the first step of parameters that accelerate has swapped."""
    mesh = device_mesh("cpu", (2,))
    for kwargs, words in (
        (dict(state_dtype="8bit"), ("state_dtype must be None", "'8bit'")),
        (dict(state_dtype="bfloat16"), ("state_dtype must be None", "'bfloat16'")),
        (dict(mantissa=True), ("mantissa must be False", "True")),
    ):
        for rule in ("matrix", "adamw")[: 1 if "mantissa" in kwargs else 2]:
            for places in ([Shard(0)], [Replicate()]):
                (_, p), = named(mesh, places, "w")  # fmt: skip
                group = [dict(params=[("w", p)], rule=rule, **kwargs)]
                raises(lambda g=group: optim.Muon(g), *words, "'w'", "sharded parameters")
                swapped = optim.Muon([("w", nn.Parameter(torch.ones(8, 6)))])
                swapped.param_groups[0].update(kwargs, rule=rule, params=[p])
                before = give_gradients(swapped)
                raises(swapped.step, *words, "'w'", "sharded parameters")
                unchanged(swapped, before)
                assert not swapped.state
    (named_stack,) = named(mesh, [Shard(1)], "e", (3, 8, 6))
    group = dict(params=[named_stack], split=(5, 3))
    raises(lambda: optim.Muon([group]), "split and heads of a stack must be None", "'e'")


@case(2, 4)
def mixed_placements_and_late_parameters_step_as_in_one_process(context: Context) -> None:
    mesh = device_mesh("cpu", (context.world,))
    torch.manual_seed(0)
    ways = ([Shard(0)], [Shard(1)], [Replicate()])
    start = [torch.randn(13, 6) for _ in range(6)]
    for cls in (optim.Muon, optim.Conda):
        theirs = [nn.Parameter(t.clone()) for t in start]
        ours = [nn.Parameter(put(t, mesh, ways[i % 3])) for i, t in enumerate(start)]
        a, b = cls(ours[:3]), cls(theirs[:3])
        for step in range(3):
            if step == 1:
                a.add_param_group({"params": ours[3:]})
                b.add_param_group({"params": theirs[3:]})
            set_gradients(step, a, b)
            a.step()
            b.step()
            same(a, b)
