"""The ranks that train one model together: those that torchrun started, or this process alone.

Every rank takes its part of each batch, so the batch of a step is the same on any number of ranks.
Rank 0 makes the output folder, prints and writes.
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

REPLICAS = 2  # of a model under hsdp
PATIENCE = timedelta(hours=1)  # for rank 0, which may have a tokenizer to train


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def leads() -> bool:
    """Whether this process prints and writes: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def check_ranks(config: Config) -> None:
    """UsageError unless --parallel says how the ranks that there are can share a step."""
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
    """torchrun's store, with keys of its own for `what`; this rank; how many there are."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    # The store is up from here on: programs that this one starts are its clients.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
    return dist.PrefixStore(what, store), rank, size


def join(what: str) -> None:
    """Make the process group of one run; its ranks wait here for one another."""
    store, rank, size = meet(what)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(store=store, rank=rank, world_size=size)  # gloo, and nccl for CUDA
    dist.barrier()


def leave() -> None:
    """End it, after what rank 0 has to write."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """What the ranks of the process group share of one model's training."""

    kind: str = ""
    rank: int = 0
    size: int = 1

    @staticmethod
    def of(config: Config) -> Ranks:
        """Those of the process group, where the run is parallel."""
        if not config.parallel:
            return Ranks()
        return Ranks(config.parallel, dist.get_rank(), dist.get_world_size())

    def device(self, name: str) -> torch.device:
        """This rank's own."""
        if self.kind and name == "cuda":
            return torch.device(name, torch.cuda.current_device())
        return torch.device(name)

    def shard(self, model: nn.Module, device: torch.device) -> None:
        """Parameters become DTensors under fsdp2 and hsdp; before an optimizer is made."""
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
        """What to call in place of the model: under ddp, what averages its gradients."""
        return nn.parallel.DistributedDataParallel(model) if self.kind == "ddp" else model

    def part(self, batch: Tensor) -> Tensor:
        """This rank's windows of a batch."""
        return batch.chunk(self.size)[self.rank]

    def synchronize(self, model: Any, now: bool) -> None:
        """Whether the next forward and backward averages gradients over the ranks."""
        if self.kind == "ddp":
            model.require_backward_grad_sync = now
        elif self.kind:
            model.set_requires_gradient_sync(now)

    def sum(self, value: float, device: torch.device) -> float:
        """Over the ranks, equal on all."""
        if not self.kind:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """State dicts of whole tensors, on rank 0; all must call it."""
        if self.kind not in ("fsdp2", "hsdp"):
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        return {"model": weights, "optimizer": state}

    def load(self, saved: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """The reverse of `state`, on any number of ranks."""
        if self.kind not in ("fsdp2", "hsdp"):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
