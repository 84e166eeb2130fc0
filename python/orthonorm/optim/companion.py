"""The update of groups with rule="adamw": AdamW's op on this rank's part of every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import PLAIN
from ..ops import adamw_step_, coded_adamw_step_
from . import storage
from .amp import flags_of
from .state import (
    ADAMW_STATE,
    MANTISSA,
    Batch,
    halved,
    kept_dtype,
    scales_of,
    working_dtype,
    zeros_for,
)
from .tensors import local, whole

if TYPE_CHECKING:
    from .base import MatrixOptimizer
    from .telemetry import Probe


def update(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> None:
    """Update parameters that have gradients by one AdamW step."""

    def some(batch: Batch, group: dict[str, Any]) -> None:
        halves = [half is not None for half in batch.halves]
        for kind in dict.fromkeys(halves):  # in one call all have mantissas, or none has
            indices = [i for i, half in enumerate(halves) if half == kind]
            update_some(opt, batch.part(indices), group)
        if not halves:
            update_some(opt, batch, group)

    keys = () if group["state_dtype"] == "8bit" else ADAMW_STATE  # its op reads codes itself
    storage.update(adamw_batch(opt, params, group), keys, group, some, True)


def update_some(opt: MatrixOptimizer, batch: Batch, group: dict[str, Any]) -> None:
    """Update a batch whose state is opened or codes, and all with mantissas or all without."""
    params, device = batch.params, batch.params[0].device
    first, second = (batch.state[key] for key in ADAMW_STATE)
    numbers = (
        batch.state["step"], opt.scalar(group, "lr", device), *group["betas"], group["eps"],
        opt.scalar(group, "weight_decay", device), group["decay_first"], group["correct_eps"],
        storage.seed_of(group), *flags_of(opt, device),
    )  # fmt: skip
    probe = opt.probe(group)
    if group["state_dtype"] == "8bit":
        scales = [batch.state[key + storage.SCALES] for key in ADAMW_STATE]
        coded_adamw_step_.unchecked(params, batch.grads, first, second, *scales, *numbers)
        if probe:
            measure_codes(probe, batch, group)
        return
    adamw_step_.unchecked(params, batch.grads, first, second, *numbers, batch.mantissas)
    if probe:
        probe.add_momenta(first)


def measure_codes(probe: Probe, batch: Batch, group: dict[str, Any]) -> None:
    """Measure the momenta that codes stand for, as many at a time as fit a work buffer."""
    key = ADAMW_STATE[0]
    rows = [t.view(1, -1) for t in batch.state[key]]
    batch = batch._replace(state={**batch.state, key: rows})
    for some in storage.parts(batch, [key], group, storage.PASS):
        probe.add_momenta(some.state[key])


def adamw_batch(opt: MatrixOptimizer, params: list[Tensor], group: dict[str, Any]) -> Batch:
    """Return a batch of parameters with AdamW's state."""
    states, own = adamw_state(opt, params, group), all(type(p) in PLAIN for p in params)

    def here(tensors: list[Any]) -> list[Tensor]:
        return tensors if own else [local(t) for t in tensors]

    names = ["step", *ADAMW_STATE]
    if group["state_dtype"] == "8bit":
        names += [key + storage.SCALES for key in ADAMW_STATE]
    state = {key: here([s[key] for s in states]) for key in names}
    grads = here([p.grad for p in params])
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    halves: list[Any] = []
    if group["mantissa"]:
        halves = [local(s[MANTISSA]) if MANTISSA in s else None for s in states]
    return Batch(here(params), grads, state, params, [0] * len(params), halves=halves)


def adamw_state(
    opt: MatrixOptimizer, params: list[Tensor], group: Mapping[str, Any]
) -> list[dict[str, Tensor]]:
    """Return the AdamW companion's state of each parameter; make what is missing."""
    states = [opt.state[p] for p in params]
    for p, state in zip(params, states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in ADAMW_STATE:
                state[key] = zeros_for(p, kept_dtype(group) or working_dtype(p, group), group)
            for key, shape in scales_of(whole(p).reshape(1, -1), ADAMW_STATE, group).items():
                state[key] = torch.zeros(shape, device=p.device)
        if halved(p, group) and MANTISSA not in state:
            state[MANTISSA] = torch.zeros_like(p, dtype=torch.int16)
    return states
