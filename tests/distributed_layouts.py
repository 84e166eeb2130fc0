"""Training under DDP, FSDP2, hybrid sharding, tensor and expert parallelism, for
distributed_cases.py: every layout with every rule, against one process, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from distributed_pairs import OPTIMIZERS, parameters, same
from distributed_registry import Context, case, device_mesh, is_shared, local, put, raises, whole
from orthonorm import optim
from orthonorm.distributed import GradScaler
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, parallel


class Net(nn.Module):
    """Even, uneven, one-row and three-row weights, a fused one, convolutions, experts, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 37)
        self.second = nn.Linear(37, 64, bias=False)
        self.few = nn.Linear(64, 3)
        self.qkv = nn.Linear(64, 72, bias=False)
        self.conv = nn.Conv2d(3, 6, 3)
        self.experts = nn.Parameter(torch.randn(4, 8, 72) / 8)
        self.row = nn.Linear(8, 1, bias=False)
        self.fused = nn.Parameter(torch.randn(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        mixed = self.mix(self.qkv(hidden))
        images = x[:, :12].reshape(-1, 3, 2, 2).repeat(1, 1, 2, 2)
        parts = (self.few(hidden), self.row(mixed), self.conv(images))
        return sum(part.square().mean() for part in parts) + (self.fused - 1).square().sum()

    def mix(self, x: Tensor) -> Tensor:
        """The sum of what all experts make of the input: every rank's own, added up."""
        if not is_shared(self.experts):
            return torch.tanh(torch.einsum("eij,bj->ebi", self.experts, x)).sum(0)
        mesh, experts = self.experts.device_mesh, self.experts.to_local()
        x = DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        mine = torch.tanh(torch.einsum("eij,bj->ebi", experts, x)).sum(0)
        return DTensor.from_local(mine, mesh, [Partial()]).full_tensor()


FUSED: dict[str, Any] = dict(
    split={"*qkv.weight": (32, 40), "*experts": (3, 5)}, heads={"*qkv.weight": (2, 1)}
)


def optimizer_of(name: str, model: nn.Module) -> Any:
    """On the groups of the model; a matrix of one row, which AdamW would take, has the rule too."""
    cls, kwargs = OPTIMIZERS[name]
    row = next(p for n, p in model.named_parameters() if n.endswith("fused"))
    groups: list[dict[str, Any]] = [
        {**group, "params": [(n, p) for n, p in group["params"] if p is not row]}
        for group in optim.split_params(model, **FUSED)
    ]
    groups.append({"params": [("fused", row)]})
    opt = cls(groups, adamw=dict(lr=0.01), **kwargs)
    assert {group["rule"] for group in opt.param_groups} == {"matrix", "adamw"}
    return opt


# ---- layouts -------------------------------------------------------------------------------------


def grid(*names: str) -> Any:
    return device_mesh("cpu", (2, 2), mesh_dim_names=names)


def ddp(model: Any, world: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: Any, world: int, mesh: Any = None, **kwargs: Any) -> nn.Module:
    mesh = mesh or device_mesh("cpu", (world,))
    fully_shard(model.second, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def fsdp2_policy(model: Any, world: int) -> nn.Module:
    """bfloat16 to compute, float32 to keep."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
    return fsdp2(model, world, mp_policy=policy)


def hybrid(model: Any, world: int) -> nn.Module:
    return fsdp2(model, world, grid("replicate", "shard"))


def tensor_parallel(model: Any, mesh: Any, rows: str, columns: str) -> nn.Module:
    """Weights of some layers cut along their rows, those of others along their columns."""
    plan: dict[str, Any] = {}
    for name in rows.split():
        plan[name] = parallel.ColwiseParallel(output_layouts=Replicate())
    for name in columns.split():
        plan[name] = parallel.RowwiseParallel(input_layouts=Replicate())
    return parallel.parallelize_module(model, mesh, plan)


def tensor(model: Any, world: int) -> nn.Module:
    """37 rows over the ranks, and 3 x 64 and 1 x 8 along their columns; the rest is plain."""
    return tensor_parallel(model, device_mesh("cpu", (world,)), "first qkv", "second few row")


def fsdp2_tensor(model: Any, world: int) -> nn.Module:
    mesh = grid("shard", "tensor")
    return fsdp2(tensor_parallel(model, mesh["tensor"], "qkv", "first"), world, mesh["shard"])


def experts(model: Any, world: int) -> nn.Module:
    """Experts over two ranks; with four, all is sharded over the other dimension of their mesh."""
    mesh = grid("shard", "experts") if world == 4 else device_mesh("cpu", (2,))
    shared = put(model.experts.detach(), mesh["experts"] if world == 4 else mesh, [Shard(0)])
    model.experts = nn.Parameter(shared)
    return fsdp2(model, world, mesh["shard"]) if world == 4 else model


LAYOUTS: dict[Callable[[Any, int], nn.Module], tuple[int, ...]] = {
    ddp: (2, 4), fsdp2: (2, 4), fsdp2_policy: (2,), hybrid: (4,), tensor: (2, 4),
    fsdp2_tensor: (4,), experts: (2, 4),
}  # fmt: skip
RULES = ("Muon", "NorMuon", "Conda", "Scion")


# ---- training ------------------------------------------------------------------------------------


def scaler_of(mixed: bool = True) -> Any:
    """Not torch's, which takes no DTensors beside plain parameters (see `what_torch_refuses`)."""
    return GradScaler("cpu", init_scale=64.0, enabled=mixed)


def gradients(model: nn.Module, seed: int, scaler: Any, mixed: bool = True) -> None:
    """Of two batches, added up."""
    for part in range(2):
        torch.manual_seed(seed + part)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(torch.randn(5, 24))
        scaler.scale(loss).backward()


def clip(opt: Any, limit: float) -> None:
    """torch's clip_grad_norm_, which refuses parameters of two meshes, or of one beside plain ones
    (see `what_torch_refuses`): so by its parts."""
    kinds: dict[Any, list[Tensor]] = {}
    for p in parameters(opt):
        kinds.setdefault(getattr(p, "device_mesh", None), []).append(p)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in some])) for some in kinds.values()]
    total = torch.stack(norms).norm()
    assert total > limit
    for some in kinds.values():
        nn.utils.clip_grads_with_norm_(some, limit, total)


def train(model: nn.Module, steps: range, data: int, opt: Any, twin: Any = None) -> None:
    """Batches are of number `data`; the twin takes the same gradients. Odd steps are mixed."""
    for step in steps:
        scaler = scaler_of(mixed=step % 2 == 1)
        opt.zero_grad()
        gradients(model, 1000 * step + 10 * data, scaler, mixed=step % 2 == 1)
        scaler.unscale_(opt)
        clip(opt, 0.5)
        if twin is not None:
            for p, q in zip(parameters(opt), parameters(twin), strict=True):
                q.grad = whole(p.grad).clone()
            twin.step()
        scaler.step(opt)


def models(kind: Any, name: str, world: int) -> tuple[nn.Module, Any, nn.Module, Any]:
    torch.manual_seed(0)
    plain = Net()
    model = kind(copy.deepcopy(plain), world)
    return model, optimizer_of(name, model), plain, optimizer_of(name, plain)


def batch_of(kind: Any, context: Context) -> int:
    """Ranks that hold parts of one model between them see the same batches."""
    model_parallel = {tensor: context.world, fsdp2_tensor: 2, experts: 2}
    return context.rank // model_parallel.get(kind, 1)


def overflow(model: nn.Module, data: int, context: Context, opt: Any) -> None:
    """One number that overflows on one rank, of the first or the last parameter, is skipped on
    all."""
    for place in (0, -1):
        scaler = scaler_of()
        opt.zero_grad()
        gradients(model, 10 * data, scaler)
        if context.rank == 1:
            held = [g for p in parameters(opt) if (g := local(p.grad)).numel()]
            held[place].view(-1)[0] = torch.inf
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 32.0


def add_layout(kind: Any, name: str, worlds: tuple[int, ...]) -> None:
    def body(context: Context) -> None:
        model, opt, _, twin = models(kind, name, context.world)
        data = batch_of(kind, context)
        train(model, range(3), data, opt, twin)
        same(opt, twin)
        overflow(model, data, context, opt)
        same(opt, twin)

    case(*worlds, name=f"{kind.__name__}_{name}")(body)


for _kind, _worlds in LAYOUTS.items():
    for _name in RULES:
        add_layout(_kind, _name, _worlds)


MIXTURE = "got mixed torch.Tensor and DTensor"


@case(4)
def what_torch_refuses(context: Context) -> None:
    """torch 2.13's limits, for which `clip` works by parts; where torch clips, to the same bits."""
    for kind, words in (
        (fsdp2_tensor, "aten.stack.default must have the same mesh"),
        (tensor, MIXTURE),
        (fsdp2, ""),
    ):
        model, opt, _, _ = models(kind, "Muon", context.world)
        gradients(model, context.rank, torch.amp.GradScaler("cpu", enabled=False))
        before = [p.grad.clone() for p in parameters(opt)]

        def theirs(params: list[Any] = parameters(opt)) -> None:  # noqa: B008
            nn.utils.clip_grad_norm_(params, 0.5)

        if words:
            raises(theirs, words)
            continue
        theirs()
        clipped = [p.grad for p in parameters(opt)]
        for p, g in zip(parameters(opt), before, strict=True):
            p.grad = g
        clip(opt, 0.5)
        for p, g in zip(parameters(opt), clipped, strict=True):
            assert torch.equal(p.grad.to_local(), g.to_local())
    model, opt, _, _ = models(tensor, "Muon", context.world)
    scaler = torch.amp.GradScaler("cpu")
    gradients(model, 0, scaler)
    raises(lambda: scaler.unscale_(opt), MIXTURE)
