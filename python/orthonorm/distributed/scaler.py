"""torch.amp.GradScaler for DTensors on several meshes, or beside plain parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import grad_scaler  # torch.amp does not export this name in torch 2.11

from ..optim.tensors import local


class GradScaler(grad_scaler.GradScaler):
    """torch.amp.GradScaler with a step that all ranks make or all skip.

    torch's own class (2.13) refuses DTensors beside plain parameters (tensor parallelism, experts).
    It also asks only the ranks of the first parameter's mesh for infinities. Under FSDP2 over
    tensor parallelism, other ranks may then step where these skip. Here every rank looks at what it
    holds, and one number is reduced over all.

    Args:
        device, **settings: arguments of torch.amp.GradScaler.
        group: the process group whose ranks step together; None: all.
    """

    def __init__(self, device: str = "cuda", *, group: Any = None, **settings: Any) -> None:
        super().__init__(device, **settings)
        self.group = group

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        here: Any = Local(optimizer.param_groups)
        found = super()._unscale_grads_(here, inv_scale, found_inf, allow_fp16)
        found = found or {found_inf.device: found_inf}  # a rank without gradients answers too
        for flag in found.values():
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return found


class Local:
    """Stand-in for an optimizer of this rank's blocks, with the one attribute a scaler reads."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = [{"params": [*map(block, group["params"])]} for group in groups]


def block(p: Tensor) -> Tensor:
    """Return this rank's block of `p`, with this rank's block of its gradient."""
    mine: Tensor = local(p.detach())
    mine.grad = None if p.grad is None else local(p.grad.detach())
    return mine
