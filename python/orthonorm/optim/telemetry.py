"""Measures of a group's step: norms and ranks, kept on the device until they are read.

They are of the last measured step, over all matrices of the group that took part:

    gradient_norm  (sum |G|_F^2)^(1/2)
    momentum_norm  (sum |U|_F^2)^(1/2), U the input of `direction`: the (Nesterov) momentum, or G
    sigma_1        the largest sigma_1(U), a lower bound: POWER_STEPS power steps that start where
                   those of the measurement before ended
    stable_rank    the mean of |U|_F^2 / sigma_1^2, so an upper bound
    nuclear_norm   sum <X, polar(X)>, X the matrix that is orthogonalized; as exact as polar(X)
    update_rms     lr (sum |s D|_F^2 / entries)^(1/2), s D the factor times the direction; no decay
    skipped        share of updates that nonfinite="skip" left out, over all steps with telemetry

Measures that a rule's own `update` does not compute are absent: Conda and StiefelAdam have only
gradient_norm and skipped, AdamW momentum_norm too (of 8-bit state as it is kept). Of sharded
matrices, a rank measures its part of the gradient, and the nuclear_norm of the matrices that it
owns; of those updated in parts (method="gram") only the gradient. A compiled step measures nothing.
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
    """|D|_F of the directions (1-D float64), their factors s, their number of entries, and lr."""

    norms: Tensor
    factors: list[float]
    entries: int
    lr: Tensor


class Probe:
    """Measures of one group: lists of tensors on its device, one for each part of the group."""

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
        """Begin a step, and set `on` if it is to be measured."""
        self.on = self.steps % every == 0
        self.steps += 1
        self.updates += updates
        self.skipped += skipped
        if self.on and updates > skipped:
            self.clear()

    def add_gradients(self, grads: list[Tensor]) -> None:
        self.gradients.append(norms(grads))

    def add_momenta(self, momenta: list[Tensor]) -> None:
        """Add the norms of momenta, for a rule that measures no more of its updates."""
        self.momenta.append(norms(momenta))

    def add_updates(self, updates: Updates) -> None:
        """Measure the input of `direction`, before the rule may overwrite it."""
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
        self.directions.append(Steps(found, each, entries, lr.clone()))  # schedules overwrite lr

    def values(self) -> dict[str, Tensor]:
        """Return the measures by name, each 0-d float64."""
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
    """Return the number of matrices in a batch (..., m, n)."""
    return math.prod(x.shape[:-2])


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return |X|_F of each tensor, of any shape, as 1-D float64."""
    return magnitude.unchecked([x.reshape(1, 1, -1) for x in tensors])


def read(probes: Sequence[Probe | None]) -> list[dict[str, float]]:
    """Return the measures of each probe as numbers, with one synchronization per device."""
    found: list[dict[str, float]] = [{} for _ in probes]
    by_device: dict[torch.device, list[tuple[int, str, Tensor]]] = {}
    for i, probe in enumerate(probes):
        if probe is None:
            continue
        if probe.updates:
            found[i]["skipped"] = probe.skipped / probe.updates
        for name, value in probe.values().items():
            by_device.setdefault(value.device, []).append((i, name, value))
    for entries in by_device.values():
        numbers = torch.stack([value for *_, value in entries]).tolist()
        for (i, name, _), number in zip(entries, numbers, strict=True):
            found[i][name] = number
    return found
