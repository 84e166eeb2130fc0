"""U: momentum, or the gradients themselves, in work buffers that a rule may write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import muon_prologue_
from .state import Batch, Updates


def updates_from(
    batch: Batch, stacks: list[Tensor], mu: Tensor | None, group: Mapping[str, Any]
) -> Updates:
    """B <- mu B + (1-mu) G, U = mu B + (1-mu) G if nesterov else B; heavy ball: G for (1-mu) G.

    Written into `stacks`. Without mu, U = G.
    """
    updates = Updates(stacks)
    if mu is None:
        torch._foreach_copy_(updates.matrices, batch.grads)
        return updates
    momenta, nesterov = batch.state["momentum_buffer"], group.get("nesterov", False)
    if not group["heavy_ball"]:
        norms = muon_prologue_.overload(batch.grads, momenta, updates.matrices, mu, nesterov)
        return Updates(stacks, norms)
    for b, g, u in zip(momenta, batch.grads, updates.matrices, strict=True):
        b.copy_(mu.to(torch.promote_types(b.dtype, torch.float32)) * b + g)
        u.copy_(mu.to(torch.promote_types(b.dtype, torch.float32)) * b + g if nesterov else b)
    return updates
