"""What each rank of tests/test_distributed.py runs: `distributed_cases.py RANK WORLD FOLDER`.

Every case is a function of a Context; what it raises is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import distributed_compat  # noqa: F401  (its cases)
import distributed_copies  # noqa: F401  (its cases)
import distributed_gram  # noqa: F401  (its cases)
import distributed_halves  # noqa: F401  (its cases)
import distributed_hosts  # noqa: F401  (its cases)
import distributed_refusals  # noqa: F401  (its cases)
import distributed_training  # noqa: F401  (its cases)
import torch
import torch.distributed as dist
from distributed_gram import worst
from distributed_layouts import fsdp2, models, train
from distributed_pairs import (
    ON_TWO,
    OPTIMIZERS,
    counted,
    follow,
    pair,
    parameters,
    placements,
    same,
    set_gradients,
)
from distributed_refusals import give_gradients, named
from distributed_registry import CASES, WORLDS, Context, case, device_mesh, put, raises, whole
from orthonorm import optim
from orthonorm.distributed import agreement, comm_report, plan, shards
from orthonorm.monitor import Monitor
from orthonorm.optim.tensors import is_cut
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard


def add_optimizer(name: str) -> None:
    def body(context: Context) -> None:
        follow(name, context.world)

    worlds = (2,) if name in ON_TWO else (2, 4)
    case(*worlds, name=f"equal_bits_{name}")(body)


for _name in OPTIMIZERS:
    add_optimizer(_name)


class Counted(optim.Signum, abstract=True):
    """An elementwise rule as a user may write one: it has state beside the momentum, and counts."""

    state_names = ("momentum_buffer", "exp_avg_sq")
    counts_steps = True

    def direction(self, updates: Any, batch: Any, group: dict[str, Any]) -> Any:
        triples = zip(updates.matrices, batch.state["exp_avg_sq"], batch.steps, strict=True)
        for u, v, t in triples:
            v.mul_(0.9).addcmul_(u, u, value=0.1)
            u.div_((v / (1 - 0.9**t)).sqrt() + 1e-8)
        return updates


@case(2)
def elementwise_rules_get_state_and_steps(context: Context) -> None:
    OPTIMIZERS["Counted"] = (Counted, {})
    follow("Counted", context.world)


# ---- checkpoints, predictions, accuracy --------------------------------------------------------


def state_of(model: nn.Module, opt: Any) -> dict[str, Any]:
    weights, state = get_state_dict(model, opt)
    return {"model": weights, "optimizer": state}


@case(4)
def checkpoint_is_saved(context: Context) -> None:
    model, opt, _, twin = models(fsdp2, "NorMuon", context.world)
    train(model, range(2), context.rank, opt, twin)
    checkpoint.save(state_of(model, opt), checkpoint_id=context.folder.parent / "checkpoint")
    same(opt, twin)
    torch.save([p.detach() for g in twin.param_groups for p in g["params"]],
               context.folder.parent / f"weights{context.rank}.pt")  # fmt: skip
    torch.save(twin.state_dict(), context.folder.parent / f"twin{context.rank}.pt")


def resume(folder: Path, model: nn.Module, opt: Any, twin: Any) -> None:
    """Load what four ranks saved, as torch's tutorial does, and the twin beside it."""
    before = [whole(p.detach()).clone() for p in model.parameters()]
    found = state_of(model, opt)  # makes the state by a step with zero gradients and lr
    assert all(whole(p).isfinite().all() for p in model.parameters())
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(p.detach()), q)
    checkpoint.load(found, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, opt, model_state_dict=found["model"],
                   optim_state_dict=found["optimizer"])  # fmt: skip
    weights = torch.load(folder / "weights0.pt", weights_only=True)
    with torch.no_grad():
        for p, w in zip((p for g in twin.param_groups for p in g["params"]), weights, strict=True):
            p.copy_(w)
    twin.load_state_dict(torch.load(folder / "twin0.pt", weights_only=True))
    same(opt, twin)


@case(2)
def checkpoint_of_four_ranks_resumes_on_two(context: Context) -> None:
    model, opt, _, twin = models(fsdp2, "NorMuon", context.world)
    resume(context.folder.parent, model, opt, twin)
    train(model, range(2, 4), context.rank, opt, twin)
    same(opt, twin)


@case(2, 4)
def predicted_bytes_are_the_counted_ones(context: Context) -> None:
    for name in ("Muon", "NorMuon", "Signum", "Conda") if context.world == 2 else ("Muon", "Conda"):
        for shape, places in placements(context.world).values():
            a, b = pair(name, device_mesh("cpu", shape), places)
            for group in a.param_groups:
                group["nonfinite"] = "skip" if name == "NorMuon" else "propagate"
            set_gradients(0, a, b)
            report = comm_report(a)
            found = counted(a.step)
            predicted = (report.sent, report.received, report.launches, 0)
            assert found == predicted, (name, places, report)
            sharded = any(is_cut(x) for x in places)
            assert (report.sent > 0) == (sharded and name != "Signum")
            assert str(report.sent) in str(report) and str(report.received) in str(report)


@case(2, 4)
def work_is_balanced(context: Context) -> None:
    """Over all buckets too, also where one matrix is more than a rank is to hold."""
    mesh, world = device_mesh("cpu", (context.world,)), context.world
    for limit, count, sizes in ((plan.BUCKET, 8, [16]), (1, 8, [16]), (1, 3 * world, [48, 32, 16])):
        weights = [nn.Parameter(put(torch.randn(n, 16), mesh, [Shard(0)]))
                   for n in sizes for _ in range(count // len(sizes))]  # fmt: skip
        with bucket_limit(limit):
            report = comm_report(optim.Muon(weights))
        assert report.work == 1 / world
        assert report.buckets == (1 if limit > 1 else count // world)


@contextlib.contextmanager
def bucket_limit(size: int) -> Iterator[None]:
    shards.buckets = functools.partial(plan.buckets, limit=size)
    try:
        yield
    finally:
        shards.buckets = plan.buckets


class Logged(NamedTuple):
    """A collective, whose end is written down."""

    work: Any
    log: list[str]

    def wait(self) -> None:
        self.log.append("wait")
        self.work.wait()


@case(2, 4)
def a_bucket_travels_while_another_computes(context: Context) -> None:
    """Two all-to-alls each; the next one's is under way at every direction but the last."""
    mesh, log = device_mesh("cpu", (context.world,)), list[str]()
    kept = dist.all_to_all_single

    def all_to_all_single(*args: Any, **kwargs: Any) -> Logged:
        log.append("start")
        return Logged(kept(*args, **kwargs), log)

    class Watched(optim.Muon, abstract=True):
        def direction(self, *args: Any) -> Any:
            log.append("compute")
            return super().direction(*args)

    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(24, 16)) for _ in range(3 * context.world)]
    a = Watched([nn.Parameter(put(p.detach(), mesh, [Shard(0)])) for p in plain])
    b = optim.Muon(plain)
    set_gradients(0, a, b)
    b.step()
    with bucket_limit(1):
        report = comm_report(a)
        dist.all_to_all_single = all_to_all_single
        try:
            a.step()
        finally:
            dist.all_to_all_single = kept
    same(a, b)
    assert report.buckets == 3 and log.count("start") == log.count("wait") == 2 * 3
    under_way = [log[:i].count("start") - log[:i].count("wait")
                 for i, event in enumerate(log) if event == "compute"]  # fmt: skip
    assert len(under_way) == 3 and all(under_way[:2]), log


@case(2)
def sixteen_bit_weights_are_as_accurate_as_in_one_process(context: Context) -> None:
    """Their norm is measured before rounding in one process, after it where rows have travelled."""
    mesh = device_mesh("cpu", (context.world,))
    for name in ("Muon", "NorMuon", "Conda"):
        for dtype in (torch.bfloat16, torch.float16):
            a, b = pair(name, mesh, [Shard(0)], dtype=dtype)
            _, truth = pair(name, mesh, [Shard(0)], dtype=torch.float64, like=dtype)
            for step in range(2):
                set_gradients(step, a, b)
                for p, q in zip(parameters(truth), parameters(b), strict=True):
                    p.grad = q.grad.double()
                for opt in (a, b, truth):
                    opt.step()
            for p, q, t in zip(parameters(a), parameters(b), parameters(truth), strict=True):
                ours, theirs = ((whole(x.detach()).double() - t).norm() for x in (p, q))
                assert ours <= 2 * theirs, (name, dtype, tuple(t.shape), ours, theirs)


@case(2)
def a_monitor_measures_whole_matrices(context: Context) -> None:
    """The same numbers; of updates, which are measured in parts, as exactly as in one process."""
    model, opt, plain, twin = models(fsdp2, "Muon", context.world)
    truth = copy.deepcopy(plain).double()
    follower = torch.optim.SGD(truth.parameters(), 1.0)

    def follow(*_: Any) -> None:
        for p, q in zip(truth.parameters(), plain.parameters(), strict=True):
            p.grad = p.detach() - q.detach()
        follower.step()

    twin.register_step_post_hook(follow)
    kinds = ("weights", "gradients", "updates")
    ours, theirs, exact = (Monitor(m, 1, kinds=kinds, budget=None) for m in (model, plain, truth))
    with ours, theirs, exact:
        train(model, range(2), context.rank, opt, twin)
    assert not ours.failures and len(ours.rows) > 50
    found, alone, true = ({row[:4]: row.value for row in m.rows} for m in (ours, theirs, exact))
    updates = {key: value for key, value in true.items() if key[1] == "updates"}
    assert found.keys() == alone.keys() and len(updates) > 20
    for key in alone.keys() - updates.keys():
        assert found[key] == alone[key], key
    mine, one = (worst(some, updates) for some in (found, alone))
    assert all(mine[metric] <= 2 * one[metric] for metric in one), (mine, one)


@case(2)
def z_a_killed_rank_ends_the_others(context: Context) -> None:
    """The last case: rank 1 is gone after it."""
    opt = optim.Muon(named(device_mesh("cpu", (2,)), [Shard(0)], "a"))
    give_gradients(opt)
    opt.step()
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    agreement.ANSWER = 0.5  # seconds
    raises(opt.step, "'a'", "rank 0", "ranks [0, 1]", "ranks [1] have ended or do not answer")


# ---- running -------------------------------------------------------------------------------------


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    results: dict[str, str] = {}
    only = os.environ.get("CASE", "")
    for name, body in CASES.items():
        if world in WORLDS[name] and only in name:
            try:
                body(Context(rank, world, folder))
                results[name] = ""
            except BaseException:  # as torch's CheckpointException is
                results[name] = traceback.format_exc()
            (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
