"""The ranks that train one model together: those that torchrun started, or this process alone.

Every rank takes its part of each batch, so the batch of a step does not depend on the number of
ranks. Rank 0 makes the output folder, prints and writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from orthonorm.examples.config import Config, UsageError
from torch import Tensor, nn
from torch.optim import Optimizer

REPLICAS = 2  # copies of a model under hsdp
PATIENCE = timedelta(hours=1)  # time to wait for rank 0, which may have to train a tokenizer


def launched() -> bool:
    """True if torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def leads() -> bool:
    """True if this process prints and writes: rank 0, or the only process."""
    return not launched() or os.environ["RANK"] == "0"


def check_ranks(config: Config) -> None:
    """Raise UsageError unless --parallel fits the ranks that torchrun started."""
    if not launched():
        if config.parallel:
            raise UsageError(
                f"--parallel {config.parallel} needs torchrun: torchrun --nproc-per-node 2 "
                "-m orthonorm train ..."
            )
        return
    size = int(os.environ["WORLD_SIZE"])
    if not config.parallel:
        raise UsageError(f"--parallel must say what {size} ranks do, ddp, fsdp2 or hsdp, got none")
    if config.batch % size:
        raise UsageError(f"--batch must be a multiple of the {size} ranks, got {config.batch}")
    if config.parallel == "hsdp" and (size % REPLICAS or size <= REPLICAS):
        raise UsageError(
            f"--parallel hsdp needs {REPLICAS} replicas of at least 2 ranks each, got {size} ranks"
        )


def meet(what: str) -> tuple[dist.Store, int, int]:
    """Return torchrun's store with a prefix of keys for `what`, this rank, and the world size."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    # The store runs from here on, so programs that this one starts must connect as its clients.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
    return dist.PrefixStore(what, store), rank, size


def join(what: str) -> None:
    """Make the process group of one run; all ranks wait here for each other."""
    store, rank, size = meet(what)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(store=store, rank=rank, world_size=size)  # gloo, and nccl for CUDA
    dist.barrier()


def leave() -> None:
    """End the process group, once rank 0 has written its files."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """The ranks of the process group and how they share the training of a model."""

    kind: str = ""
    rank: int = 0
    size: int = 1

    @staticmethod
    def of(config: Config) -> Ranks:
        """Return the ranks of the process group, or a single one if the run is not parallel."""
        if not config.parallel:
            return Ranks()
        return Ranks(config.parallel, dist.get_rank(), dist.get_world_size())

    def device(self, name: str) -> torch.device:
        """Return the device of this rank."""
        if self.kind and name == "cuda":
            return torch.device(name, torch.cuda.current_device())
        return torch.device(name)

    def shard(self, model: nn.Module, device: torch.device) -> None:
        """Make parameters DTensors under fsdp2 and hsdp; call it before making an optimizer."""
        if self.kind not in ("fsdp2", "hsdp"):
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        hybrid = self.kind == "hsdp"
        shape = (REPLICAS, self.size // REPLICAS) if hybrid else (self.size,)
        names = ("replicate", "shard") if hybrid else ("shard",)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        for block in model.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def replicated(self, model: nn.Module) -> nn.Module:
        """Return the module to call in place of the model; under ddp it averages gradients."""
        return nn.parallel.DistributedDataParallel(model) if self.kind == "ddp" else model

    def part(self, batch: Tensor) -> Tensor:
        """Return this rank's windows of a batch."""
        return batch.chunk(self.size)[self.rank]

    def synchronize(self, model: Any, now: bool) -> None:
        """Set if the next forward and backward averages gradients over the ranks."""
        if self.kind == "ddp":
            model.require_backward_grad_sync = now
        elif self.kind:
            model.set_requires_gradient_sync(now)

    def sum(self, value: float, device: torch.device) -> float:
        """Return the sum of a value over the ranks, on all of them."""
        if not self.kind:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return state dicts of whole tensors, complete on rank 0; all ranks must call."""
        if self.kind not in ("fsdp2", "hsdp"):
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        return {"model": weights, "optimizer": state}

    def load(self, saved: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """Load the result of `state`, on any number of ranks."""
        if self.kind not in ("fsdp2", "hsdp"):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
