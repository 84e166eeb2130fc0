"""Updates U: momentum, or the gradients themselves, in work buffers that a rule may write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import muon_prologue_
from ..ops.normalize import accumulator
from ..ops.passes import unscaled
from .amp import NO_FLAGS, Flags
from .state import MOMENTUM, Batch, Updates


def updates_from(
    batch: Batch,
    stacks: list[Tensor],
    mu: Tensor | None,
    group: Mapping[str, Any],
    flags: Flags = NO_FLAGS,
) -> Updates:
    """B <- mu B + (1-mu) G, U = mu B + (1-mu) G if nesterov else B; heavy ball: G for (1-mu) G.

    U is written into `stacks`. If mu is None, U = G and there is no momentum.
    """
    updates = Updates(stacks)
    if mu is None:
        grads = batch.grads
        if flags.grad_scale is not None:
            grads = [unscaled(g, flags.grad_scale, accumulator(g)) for g in grads]
        torch._foreach_copy_(updates.matrices, grads)
        return updates
    momenta, nesterov = batch.state[MOMENTUM], group.get("nesterov", False)
    if not group["heavy_ball"]:
        norms = muon_prologue_.unchecked(
            batch.grads, momenta, updates.matrices, mu, nesterov, *flags
        )
        return Updates(stacks, norms)
    for b, g, u in zip(momenta, batch.grads, updates.matrices, strict=True):
        dtype = torch.promote_types(b.dtype, torch.float32)
        x = unscaled(g, flags.grad_scale, dtype)
        b.copy_(mu.to(dtype) * b + x)
        u.copy_(mu.to(dtype) * b + x if nesterov else b)
    return updates
