"""Flags that torch.amp.GradScaler hands to a step: tensors on the device; no host reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.passes import kept


class Flags(NamedTuple):
    """Flags of a step: one-element tensors on the parameters' device, or None."""

    grad_scale: Tensor | None = None  # the gradients are multiplied by this number
    found_inf: Tensor | None = None  # if not 0, parameters and state stay as they are


NO_FLAGS = Flags()


def flags_of(optimizer: object, device: torch.device) -> Flags:
    """Return the attributes that GradScaler.step sets on an optimizer while it steps."""
    given = (getattr(optimizer, name, None) for name in Flags._fields)
    return Flags(*(None if t is None else t.to(device, non_blocking=True) for t in given))


@contextmanager
def unless(found_inf: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """Undo what is written to `tensors` within the context, if `found_inf` is not 0."""
    if found_inf is None:
        yield
        return
    before = [t.clone() for t in tensors]
    yield
    for t, old in zip(tensors, before, strict=True):
        t.copy_(kept(found_inf, old, t))
