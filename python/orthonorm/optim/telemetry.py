"""What a step knows of its group: norms and ranks, left on the device until they are asked for.

Of the last step that was measured, over all matrices of the group that took part:

    gradient_norm  (sum |G|_F^2)^(1/2)
    momentum_norm  (sum |U|_F^2)^(1/2), U what `direction` is given: the (Nesterov) momentum, or G
    sigma_1        the largest sigma_1(U), a lower bound: POWER_STEPS power steps, warm from the
                   measurement before
    stable_rank    the mean of |U|_F^2 / sigma_1^2, so an upper bound
    nuclear_norm   sum <X, polar(X)>, X what a rule orthogonalizes, as exact as its polar factor
    update_rms     lr (sum |s D|_F^2 / entries)^(1/2): of what the rule subtracts, decay apart
    skipped        share of updates that nonfinite="skip" left out, over all steps with telemetry

What a step of its own form does not show is absent: Conda and StiefelAdam have gradient_norm and
skipped, AdamW momentum_norm too. Of sharded matrices a rank tells its part of the gradient, and
nuclear_norm of those it owns, and nothing of those that are updated in parts (method="gram") but
the gradient. A compiled step measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import inner, magnitude, power_iteration_
from ..ops.spectral import start_vector
from .state import Updates

POWER_STEPS = 4


class Steps(NamedTuple):
    """|D|_F of the directions (1-D float64), their factors s, entries in all, and lr."""

    norms: Tensor
    factors: list[float]
    entries: int
    lr: Tensor


class Probe:
    """What one group measured: tensors on its device, one for each part of the group."""

    def __init__(self) -> None:
        self.on = False
        self.steps = self.updates = self.skipped = 0
        self.vectors: dict[int, list[Tensor]] = {}  # right singular vectors of a part's stacks
        self.clear()

    def clear(self) -> None:
        self.gradients: list[Tensor] = []
        self.momenta: list[Tensor] = []
        self.tops: list[Tensor] = []
        self.nuclear: list[Tensor] = []
        self.directions: list[Steps] = []

    def begin(self, every: int, updates: int, skipped: int) -> None:
        """A step begins; `on` says whether it is one to measure."""
        self.on = self.steps % every == 0
        self.steps += 1
        self.updates += updates
        self.skipped += skipped
        if self.on and updates > skipped:
            self.clear()

    def add_gradients(self, grads: list[Tensor]) -> None:
        self.gradients.append(norms(grads))

    def add_momenta(self, momenta: list[Tensor]) -> None:
        """Of a rule that shows no more."""
        self.momenta.append(norms(momenta))

    def add_updates(self, updates: Updates) -> None:
        """What a rule is given, before it may write it."""
        stacks, part = updates.stacks, len(self.momenta)
        self.momenta.append(magnitude.unchecked(stacks) if updates.norms is None else updates.norms)
        v = self.vectors.get(part, [])
        if [x.shape for x in v] != [(*x.shape[:-2], x.shape[-1]) for x in stacks]:
            v = self.vectors[part] = [start_vector(x) for x in stacks]
        u = [x.new_empty(x.shape[:-1], dtype=y.dtype) for x, y in zip(stacks, v, strict=True)]
        self.tops.append(power_iteration_.unchecked(stacks, u, v, POWER_STEPS).double())

    def add_polar(self, updates: Updates, factors: Updates) -> None:
        self.nuclear.append(inner.unchecked(updates.stacks, factors.stacks))

    def add_directions(self, directions: Updates, factors: Sequence[float], lr: Tensor) -> None:
        matrices = directions.matrices
        each = [s for s, x in zip(factors, matrices, strict=True) for _ in range(count(x))]
        entries = sum(x.numel() for x in matrices)
        found = magnitude.unchecked(directions.stacks)
        self.directions.append(Steps(found, each, entries, lr.clone()))  # schedules write lr

    def values(self) -> dict[str, Tensor]:
        """By name, 0-d float64."""
        found = {}
        for name, parts in (("gradient_norm", self.gradients), ("momentum_norm", self.momenta)):
            if parts:
                found[name] = torch.cat(parts).square().sum().sqrt()
        if self.tops:
            top, size = torch.cat(self.tops), torch.cat(self.momenta)
            found["sigma_1"] = top.max()
            found["stable_rank"] = torch.where(top == 0, 0.0, (size / top).square()).mean()
        if self.nuclear:
            found["nuclear_norm"] = torch.cat(self.nuclear).sum()
        if self.directions:
            squares = [(d.lr * d.norms * d.norms.new_tensor(d.factors)).square().sum()
                       for d in self.directions]  # fmt: skip
            entries = sum(d.entries for d in self.directions)
            found["update_rms"] = (torch.stack(squares).sum() / entries).sqrt()
        return found


def count(x: Tensor) -> int:
    """Matrices in a batch."""
    return math.prod(x.shape[:-2])


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """|X|_F of tensors of any shape."""
    return magnitude.unchecked([x.reshape(1, 1, -1) for x in tensors])


def read(probes: Sequence[Probe | None]) -> list[dict[str, float]]:
    """Numbers, one synchronization for each device."""
    found: list[dict[str, float]] = [{} for _ in probes]
    by_device: dict[torch.device, list[tuple[int, str, Tensor]]] = {}
    for i, probe in enumerate(probes):
        if probe is None:
            continue
        if probe.updates:
            found[i]["skipped"] = probe.skipped / probe.updates
        for name, value in probe.values().items():
            by_device.setdefault(value.device, []).append((i, name, value))
    for rows in by_device.values():
        numbers = torch.stack([value for *_, value in rows]).tolist()
        for (i, name, _), number in zip(rows, numbers, strict=True):
            found[i][name] = number
    return found
