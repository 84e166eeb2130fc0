"""How far outputs are from an oracle, as `test_ops.py` judges it."""

from __future__ import annotations

import torch
from torch import Tensor


def scales(want: Tensor) -> tuple[float, float]:
    """Root mean square, of numbers whose squares may leave the range, and the largest."""
    sizes = want.double().abs()
    peak = sizes.max().item()
    return (sizes / peak).square().mean().sqrt().item() * peak if peak > 0 else 0.0, peak


class Errors:
    """Relative errors of one output, pooled over entries and calls: rms over each entry's rms, and
    the largest over each entry's largest number."""

    def __init__(self) -> None:
        self.count, self.squares, self.largest = 0, 0.0, 0.0
        self.moved = 0  # codes

    def add(self, got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape, (got.shape, want.shape)
        if want.numel() == 0:
            return
        off = (got.double() - want.double()).abs()
        least = torch.finfo(got.dtype).smallest_normal
        scale, peak = scales(want)
        self.count += want.numel()
        self.squares += off.div(max(scale, least)).square().sum().item()
        self.largest = max(self.largest, off.max().item() / max(peak, least))

    def add_codes(self, got: Tensor, want: Tensor) -> None:
        off = (got.int() - want.int()).abs()
        assert int(off.max() if off.numel() else 0) <= 1
        self.moved += int(off.sum())

    @property
    def typical(self) -> float:
        return (self.squares / max(self.count, 1)) ** 0.5
