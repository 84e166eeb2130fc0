"""Cases of tests/test_distributed.py: sums of Gram matrices, and whole experts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import orthonorm
import torch
import torch.distributed as dist
from distributed_pairs import counted, same, set_gradients
from distributed_registry import Context, case, device_mesh, is_shared, put, raises, whole
from oracle_muon import muon
from orthonorm import monitor, optim
from orthonorm.distributed import comm_report
from orthonorm.monitor.shards import part_norms, spread_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

TALL = ((400, 24), (301, 7), (9, 2), (160, 1))  # (9, 2): nothing on the last of four ranks
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "Muon": (optim.Muon, dict(lr=0.02, weight_decay=0.1, restarts=())),
    "Scion": (optim.Scion, dict(lr=0.02, momentum=0.1, restarts=())),
    "NorMuon": (optim.NorMuon, dict(lr=0.02, restarts=())),
    "NorMuon, long": (optim.NorMuon, dict(axis="long", rescale="rms", restarts=())),
    "Conda": (optim.Conda, dict(update_proj_gap=2, weight_decay=0.1)),
    "SOAP": (optim.SOAP, dict(max_precond_dim=8, precondition_frequency=1)),
    "SOAP, study": (optim.SOAP, dict(max_precond_dim=7, variant="study", decay="cautious")),
}
ON_FOUR = ("Muon", "NorMuon", "Conda", "SOAP")


def makers(context: Context) -> list[tuple[Any, list[Any], bool]]:
    """Meshes and placements, and whether matrices are wide."""
    flat = device_mesh("cpu", (context.world,))
    found: list[Any] = [(flat, [Shard(0)], False), (flat, [Shard(1)], True)]
    if context.world == 2:  # a cut among one rank is none
        found.append((device_mesh("cpu", (1, 2)), [Shard(1), Shard(0)], False))
    if context.world == 4:
        found.append((device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)], False))
    return found


def optimizer(name: str, tensors: list[Tensor], state: str | None = None) -> Any:
    cls, kwargs = RULES[name]
    params = [nn.Parameter(t) for t in tensors]
    return cls(params, method="gram", state_dtype=state, **kwargs)


def params(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def steps(opt: Any, gradients: list[list[Tensor]]) -> None:
    for some in gradients:
        for p, g in zip(params(opt), some, strict=True):
            g = g.to(p.dtype)
            p.grad = put(g, p.device_mesh, p.placements) if is_shared(p) else g
        opt.step()


def inputs(dtype: torch.dtype, wide: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    torch.manual_seed(0)
    shapes = [s[::-1] if wide else s for s in TALL]
    return ([torch.randn(s).to(dtype) for s in shapes],
            [[torch.randn(s).to(dtype) for s in shapes] for _ in range(2)])  # fmt: skip


def exact(name: str, start: list[Tensor], gradients: list[list[Tensor]]) -> list[Any]:
    """The weights in float64; those of float64, which is Muon's, in NumPy's longdouble."""
    if start[0].dtype != torch.float64:
        truth = optimizer(name, [t.double() for t in start])
        steps(truth, gradients)
        return [p.detach().numpy() for p in params(truth)]
    found = [t.numpy().astype(np.longdouble) for t in start]
    states: list[dict[str, Any]] = [{} for _ in start]
    for t, some in enumerate(gradients):
        for i, g in enumerate(some):
            G = g.numpy().astype(np.longdouble)
            found[i] = muon(found[i], G, states[i], t, lr=0.02, weight_decay=0.1)
    return found


@functools.cache
def one_process(
    name: str, dtype: torch.dtype, wide: bool, state: str | None
) -> tuple[float, list[Any]]:
    """How far torch is off in the dtype, and from what."""
    start, gradients = inputs(dtype, wide)
    twin = optimizer(name, [t.clone() for t in start], state)
    with orthonorm.reference():
        steps(twin, gradients)
        truth = exact(name, start, gradients)
    return furthest(params(twin), truth), truth


def furthest(found: list[Any], truth: list[Any]) -> float:
    """The largest relative error of a matrix, in Frobenius norm."""
    pairs = zip((whole(p.detach()).double().numpy() for p in found), truth, strict=True)
    return max(float(np.sqrt(((x - t) ** 2).sum() / (t * t).sum())) for x, t in pairs)


@case(2, 4)
def sums_of_gram_matrices_are_as_accurate_as_one_process(context: Context) -> None:
    """err <= 2 err of torch in the same dtype, both against float64, or NumPy's longdouble."""
    for name in RULES if context.world == 2 else ON_FOUR:
        for mesh, places, wide in makers(context):
            kinds = [(dtype, None) for dtype in (DTYPES if name == "Muon" else DTYPES[:1])]
            for dtype, state in [*kinds, (torch.bfloat16, "float32")]:
                start, gradients = inputs(dtype, wide)
                ours = optimizer(name, [put(t, mesh, places) for t in start], state)
                report = comm_report(ours)
                assert report.summed > 0
                if "NorMuon" not in name:  # whose lines are more than small matrices are
                    assert report.sent == 0 or dtype == torch.bfloat16  # sums are of float32
                steps(ours, gradients)
                theirs, truth = one_process(name, dtype, wide, state)
                mine = furthest(params(ours), truth)
                assert mine <= 2 * theirs, (name, places, dtype, mine, theirs)
                for p in params(ours):
                    if places[0] == Replicate():
                        copies = [torch.empty_like(p.to_local()) for _ in range(2)]
                        dist.all_gather(copies, p.to_local().detach(), group=mesh.get_group(0))
                        assert torch.equal(*copies)


@case(2, 4)
def sums_of_gram_matrices_are_counted(context: Context) -> None:
    """At every step: Conda's second one here is without a refresh."""
    for name in RULES if context.world == 2 else ON_FOUR:
        for mesh, places, wide in makers(context):
            start, gradients = inputs(torch.float32, wide)
            ours = optimizer(name, [put(t, mesh, places) for t in start])
            for some in gradients:
                report = comm_report(ours)
                found = counted(lambda ours=ours, g=some: steps(ours, [g]))
                expected = (report.sent, report.received, report.launches, report.summed)
                assert found == expected, (name, report, found)
                assert str(report.summed) in str(report)
            pinned = optimizer(name, [put(t, mesh, places) for t in start])
            pinned.param_groups[0]["method"] = "auto"
            assert comm_report(pinned).summed == 0 < comm_report(pinned).sent


@case(2)
def a_long_side_that_is_cut_has_no_factor(context: Context) -> None:
    mesh = device_mesh("cpu", (2,))
    cut = nn.Parameter(put(torch.randn(40, 6), mesh, [Shard(0)]))
    raises(lambda: optim.SOAP([("w", cut)], method="gram"), "SOAP", "'w'", "max_precond_dim", "40")
    optim.SOAP([("w", cut)], method="gram", max_precond_dim=39)
    raises(lambda: optim.Conda([cut], method="direct"), "Conda", "method", "'direct'")


@case(2, 4)
def sums_of_gram_matrices_do_not_depend_on_scale_and_keep_what_is_not_finite(
    context: Context,
) -> None:
    mesh = device_mesh("cpu", (context.world,))
    start, gradients = inputs(torch.float32, wide=False)
    found = []
    for size in (1.0, 2.0**100, 2.0**-100):
        ours = optimizer("Muon", [put(t, mesh, [Shard(0)]) for t in start])
        some = [g * size for g in gradients[0]]
        some[1] = some[1] * 0
        some[2] = some[2] / 0
        steps(ours, [some])
        found.append([whole(p.detach()) for p in params(ours)])
    for one, other in zip(found[0], found[1], strict=True):
        assert torch.equal(one, other) or one.isnan().all()
    assert all(torch.equal(found[0][i], found[2][i]) for i in (0, 1, 3))
    assert not found[0][2].isfinite().any() and found[0][0].isfinite().all()
    assert torch.equal(found[0][1], (1 - 0.02 * 0.1) * start[1])


@case(2, 4)
def spectral_norms_of_parts_are_those_of_the_whole(context: Context) -> None:
    """Nothing is gathered; err <= 2 err of torch in the same dtype, both against float64."""
    mesh = device_mesh("cpu", (context.world,))
    torch.manual_seed(0)
    shapes = ((40, 24), (24, 41), (9, 2), (1, 16), (5, 5))
    start = [torch.randn(s) for s in shapes]
    start[-1] = start[-1] * 0
    gathers, full_tensor = [0], DTensor.full_tensor

    def gathered(self: DTensor) -> Tensor:
        gathers[0] += 1
        return full_tensor(self)

    for places in ([Shard(0)], [Shard(1)]):
        DTensor.full_tensor = gathered
        try:
            found = measured([put(t, mesh, places) for t in start])
        finally:
            DTensor.full_tensor = full_tensor
        with orthonorm.reference():
            theirs = measured(start)
            truth = measured([t.double() for t in start])
        assert found.keys() == truth.keys() and len(found) == 2 * 3 * len(shapes)
        mine, torchs = (worst(x, truth) for x in (found, theirs))
        assert all(mine[metric] <= 2 * torchs[metric] for metric in torchs), (mine, torchs, places)
        errors = []
        for t in start[:-1]:
            true = monitor.sigma_1(t.double(), limit=0)
            ours = monitor.sigma_1(put(t, mesh, places))
            with orthonorm.reference():
                alone = monitor.sigma_1(t, limit=0)
            errors.append([abs(float(x / true - 1)) for x in (ours, alone)])
        ours, alone = map(max, zip(*errors, strict=True))
        assert ours <= 2 * alone, (ours, alone, places)
    assert gathers == [0]


@case(2, 4)
def sums_of_a_monitor_are_counted(context: Context) -> None:
    """A gather of norms and a float64 sum a power step: of W^T u and |W v|^2, n + 1 numbers where
    rows are cut; where columns are, of W v at the start and W W^T u with |W^T u|^2 after it."""
    mesh, steps = device_mesh("cpu", (context.world,)), 3
    shapes = ((40, 24), (24, 41), (9, 2))
    for place, sent in (
        (Shard(0), [steps * (n + 1) for _, n in shapes]),
        (Shard(1), [m + steps * (m + 1) for m, _ in shapes]),
    ):
        cut = [put(torch.randn(s), mesh, [place]) for s in shapes]
        spread = spread_of(cut[0])
        found = counted(lambda a=cut, s=spread: part_norms(a, s, steps, [None] * len(a)))
        assert found == (0, 0, 1 + steps + (place == Shard(1)), 8 * sum(sent))


def worst(found: dict[Any, float], truth: dict[Any, float]) -> dict[str, float]:
    """The largest relative error of every metric; a matrix of zeros has exact ones."""
    errors: dict[str, float] = {}
    for key, exact in truth.items():
        assert exact or not found[key], key
        error = abs(found[key] / exact - 1) if exact else 0.0
        errors[key[3]] = max(errors.get(key[3], 0.0), error)
    return errors


def measured(tensors: list[Tensor]) -> dict[Any, float]:
    """Two steps of a Monitor on weights, the second from the vectors of the first."""
    model = nn.ParameterList([nn.Parameter(t) for t in tensors])
    with monitor.Monitor(
        model, 1, kinds=("weights",), metrics=("sigma_1", "frobenius", "stable_rank"), budget=None
    ) as watching:
        for _ in range(2):
            watching.step()
    assert not watching.failures, watching.failures
    return {row[:4]: row.value for row in watching.rows}


@case(2)
def experts_and_heads_that_no_shard_cuts_stay_local(context: Context) -> None:
    """Rules that no owner can compute run where whole matrices are local."""
    mesh = device_mesh("cpu", (2,))
    for shape, views in (((3, 6, 5), {}), ((24, 5), dict(heads=6))):
        for cls in (optim.Conda, optim.SOAP, optim.Shampoo):
            torch.manual_seed(0)
            plain = nn.Parameter(torch.randn(shape))
            ours = nn.Parameter(put(plain.detach(), mesh, [Shard(0)]))
            a, b = (cls([{"params": [p], **views}]) for p in (ours, plain))
            for step in range(3):
                set_gradients(step, a, b)
                report = comm_report(a)
                assert (report.sent, report.launches, report.local) == (0, 0, 1)
                assert counted(a.step) == (0, 0, 0, 0)
                b.step()
            same(a, b)
