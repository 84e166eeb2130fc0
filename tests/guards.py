"""Tensors with bands of a known byte before and behind them, for kernels that leave their own."""

from __future__ import annotations

import test_ops
import torch
from orthonorm.bench.cases import Case
from orthonorm.bench.inputs import Inputs, map_tensors
from torch import Tensor

BAND, MARK = 256, 0x5A  # bytes; keeps the alignment that kernels look for


def check_bands(case: Case, shapes: test_ops.Shapes, inputs: Inputs) -> None:
    """The op on contiguous, aligned tensors writes nothing outside of them."""
    bands: list[Tensor] = []

    def guarded(t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        memory = torch.full((BAND + size + BAND,), MARK, dtype=torch.uint8, device=t.device)
        bands.extend((memory[:BAND], memory[BAND + size :]))
        inside = memory[BAND : BAND + size].view(t.dtype).view(t.shape)
        return inside.copy_(t)

    arguments = map_tensors(test_ops.made(case, shapes, inputs), guarded)
    test_ops.run(case, case.op, arguments)
    assert bands and all(bool((band == MARK).all()) for band in bands), case.name
