"""orthonorm.compat on ranks, for distributed_cases.py."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
import torch.distributed as dist
from distributed_registry import Context, case
from orthonorm import optim
from orthonorm.compat import emerging_optimizers as nvidia
from orthonorm.ops import newton_schulz
from orthonorm.polar import polynomial
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@case(2)
def tensor_parallel_newton_schulz(context: Context) -> None:
    """Gathered: the bits of the whole matrix. By summed Gram matrices: twice the Gram form's error.

    Along either dimension, the shorter and the longer.
    """
    torch.manual_seed(0)
    rank, world, group = context.rank, context.world, dist.group.WORLD
    for shape in ((24, 40), (40, 24)):
        x = torch.randn(shape)
        whole = nvidia.newton_schulz(x, 5, "quintic")
        p = polynomial("you5", 5, method="gram", precision="float32")
        exact = newton_schulz.reference([x.double()], p.coefficients, [], "direct")[0]
        same_form = newton_schulz.reference([x], p.coefficients, p.restarts, "gram", "float32")[0]
        allowed = 2 * (same_form - exact).norm()
        for dim in (0, 1):
            part = x.chunk(world, dim)[rank]
            gathered = nvidia.newton_schulz_tp(part, 5, "quintic", group, dim)
            assert torch.equal(gathered, whole.chunk(world, dim)[rank])
            spread = nvidia.newton_schulz_tp(part, 5, "quintic", group, dim, "distributed")
            assert spread.shape == part.shape
            parts = [torch.empty_like(spread) for _ in range(world)]
            dist.all_gather(parts, spread)
            error = (torch.cat(parts, dim).double() - exact).norm()
            assert error <= allowed, (shape, dim, error, allowed)


def accelerate_swaps_the_parameters(context: Context) -> None:
    """FSDP2 by accelerate: the optimizer, made of the whole model, steps its shards."""
    rank, world = context.rank, context.world
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 37), nn.LayerNorm(37), nn.Linear(37, 12))

    plain = network()
    twin = optim.NorMuon(optim.split_params(plain), lr=0.02)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                      MASTER_ADDR="localhost", MASTER_PORT="0")  # fmt: skip
    accelerator = Accelerator(cpu=True)
    # accelerate has FSDP2 on accelerators only, though it works on a CPU: it is told so here
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    model = network()
    groups = optim.split_params(model)
    model, optimizer = accelerator.prepare(model, optim.NorMuon(groups, lr=0.02))
    assert all(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"])
    for step in range(3):
        data = torch.randn(2 * world, 12, generator=torch.Generator().manual_seed(step))
        for net, opt, x, backward in (
            (model, optimizer, data.chunk(world)[rank], accelerator.backward),
            (plain, twin, data, Tensor.backward),
        ):  # fmt: skip
            backward(net(x).square().mean())
            opt.step()
            opt.zero_grad()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, atol=1e-5, rtol=0, msg=name)


if find_spec("accelerate"):  # without it test_frameworks.py says what is skipped
    case(2)(accelerate_swaps_the_parameters)
