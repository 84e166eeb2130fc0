"""Matrices from their 8-bit codes and scales, a list in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from orthonorm import ops
from orthonorm.ops.blocks import table_of
from torch import Tensor

from . import elementwise as each
from .quantize_blocks import coded, decoded, scales_at


@triton.jit(do_not_specialize=["count"])
def dequantize_kernel(
    table, count, values, STEPS: tl.constexpr, X_TYPE: tl.constexpr, CODES_TYPE: tl.constexpr,
    SCALES_TYPE: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x <- value of its code times scale of its block, in float32."""
    entry, batch, start, local, mask = each.place(table, count, STEPS, FLAT, BLOCK)
    codes_at = each.elements(table, count, entry, batch, start, local, 1, CODES_TYPE, FLAT)
    code = tl.load(codes_at, mask=mask, other=0).to(tl.int32)
    at, inside = scales_at(table, count, entry, batch, start, 2, SCALES_TYPE, BLOCK)
    scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = decoded(code, scale, values)
    x_at = each.elements(table, count, entry, batch, start, local, 0, X_TYPE, FLAT)
    tl.store(x_at, tl.reshape(value, (BLOCK,)).to(X_TYPE), mask=mask)


def dequantize_blocks_(
    out: list[Tensor], codes: list[Tensor], scales: list[Tensor], signed: bool = True
) -> None:
    if not out or any(t.dtype == torch.float64 for t in (*out, *scales)):
        return ops.dequantize_blocks_.definition(out, codes, scales, signed)
    values = table_of(signed, out[0].device)
    for group in coded((out, codes), (scales,)):
        table = group.table((), out[0].device)
        dequantize_kernel[(table.tiles,)](
            table.data, table.count, values, table.steps, *group.constants, **each.OPTIONS
        )
