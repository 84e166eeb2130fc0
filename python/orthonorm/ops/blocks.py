"""Numbers kept in 8 bits by block-wise dynamic codes (arXiv:2110.02861).

Every BLOCK elements of a matrix, row by row, share a scale, their largest absolute value; an
element is the nearest of 256 values of [-1, 1] times it (`values`, the map of bitsandbytes'
create_dynamic_map). The last block of a matrix may be shorter; none spans two matrices, so that NaN
stays in its own. Second moments, which are not negative, have the map of [0, 1], where what is
positive is never rounded to 0: a step divides by their roots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._library import op

BLOCK = 256  # elements; 4 bytes of scale are 1/64 byte for each


@functools.cache
def values(signed: bool) -> list[float]:
    """The 256 values in order: of seven decades, each with twice the means of the one below; 0; 1.
    Unsigned: of each decade twice as many."""
    found = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        means = [0.1 + 0.9 * (k + 0.5) / count for k in range(count)]
        found += [10.0 ** (i - 6) * mean for mean in means]
        found += [-(10.0 ** (i - 6)) * mean for mean in means if signed]
    return sorted(found)


@functools.cache
def table_of(signed: bool, device: torch.device) -> Tensor:
    """`values` there. Kept: the copy waits for the device, and cannot be part of a CUDA graph."""
    return torch.tensor(values(signed), dtype=torch.float32, device=device)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of matrices (..., m, n)."""
    return (*shape[:-2], -(-shape[-2] * shape[-1] // BLOCK))


@op("quantize_blocks_(Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] X, bool signed=True) -> ()")
def quantize_blocks_(
    codes: list[Tensor], scales: list[Tensor], X: list[Tensor], signed: bool = True
) -> None:
    """scale <- max |x| of every BLOCK elements, codes <- argmin_c |x / scale - values(signed)_c|.

    Of x / scale in float32: its code is the number of means of neighbouring values below it, so a
    tie takes the lower one. A block of zeros has the scale 0 and the code of 0, a NaN the code 255
    and its block the scale NaN. With `signed=False` what is positive has no code below 1.

    Shapes: X[i] is (..., m, n); codes[i] too, uint8; scales[i] is (..., ceil(m n / BLOCK)).
    Source: arXiv:2110.02861.
    """
    if not X:
        return
    rows = torch.cat([blocks(x.float()) for x in X])
    tops = rows.abs().amax(1, keepdim=True)
    rows = torch.where(tops == 0, 0.0, rows / tops)
    table = table_of(signed, rows.device)
    found = torch.bucketize(rows, (table[1:] + table[:-1]) / 2, out_int32=True)
    if not signed:
        found = torch.where(rows > 0, found.clamp(min=1), found)
    for x, new in zip(codes, unblocked(found.to(torch.uint8), codes), strict=True):
        x.copy_(new)
    for s, top in zip(scales, tops.split([s.numel() for s in scales]), strict=True):
        s.copy_(top.view(s.shape))


@quantize_blocks_.check
def _(codes: list[Tensor], scales: list[Tensor], X: list[Tensor], signed: bool = True) -> None:
    check_coded("quantize_blocks_", "X", X, codes, scales)


@op("dequantize_blocks_(Tensor(a!)[] out, Tensor[] codes, Tensor[] scales, bool signed=True) -> ()")
def dequantize_blocks_(
    out: list[Tensor], codes: list[Tensor], scales: list[Tensor], signed: bool = True
) -> None:
    """out <- values(signed)_code * scale, in float32, with the scale of the element's block.

    Shapes: out[i] is (..., m, n); codes[i] too, uint8; scales[i] is (..., ceil(m n / BLOCK)), as
    `quantize_blocks_` leaves them. Source: arXiv:2110.02861.
    """
    if not out:
        return
    rows = torch.cat([blocks(c) for c in codes])
    table = table_of(signed, rows.device)
    rows = table[rows.int()] * torch.cat([s.flatten().float() for s in scales]).unsqueeze(1)
    for x, new in zip(out, unblocked(rows, out), strict=True):
        x.copy_(new)


@dequantize_blocks_.check
def _(out: list[Tensor], codes: list[Tensor], scales: list[Tensor], signed: bool = True) -> None:
    check_coded("dequantize_blocks_", "out", out, codes, scales)


def blocks(t: Tensor) -> Tensor:
    """The elements of each matrix in rows of BLOCK, filled up with zeros."""
    size = t.shape[-2] * t.shape[-1]
    return F.pad(t.flatten(-2), (0, -size % BLOCK)).reshape(-1, BLOCK)


def unblocked(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The reverse of `blocks` on a list of matrices."""
    found = []
    shapes = [scales_shape(t.shape) for t in like]
    for part, t, shape in zip(rows.split([*map(math.prod, shapes)]), like, shapes, strict=True):
        flat = part.reshape(*shape[:-1], shape[-1] * BLOCK)[..., : t.shape[-2] * t.shape[-1]]
        found.append(flat.unflatten(-1, tuple(t.shape[-2:])))
    return found


def check_coded(
    name: str, label: str, X: list[Tensor], codes: list[Tensor], scales: list[Tensor]
) -> None:
    check.tensors(name, label, X, min_dim=2)
    if not isinstance(codes, (list, tuple)):
        raise TypeError(f"{name}: codes must be a list of tensors, got {type(codes).__name__}")
    for i, c in enumerate(codes):
        if not isinstance(c, Tensor) or c.layout != torch.strided or c.dtype != torch.uint8:
            got = f"{c.dtype}, {c.layout}" if isinstance(c, Tensor) else type(c).__name__
            raise TypeError(f"{name}: codes[{i}] must be a dense uint8 Tensor, got {got}")
    check.tensors(name, "scales", scales)
    check.same_shapes(name, **{label: X, "codes": codes})
    check.same_lengths(name, **{label: X, "scales": scales})
    for i, (x, s) in enumerate(zip(X, scales, strict=True)):
        check.equal_shape(name, f"scales[{i}]", s, scales_shape(x.shape))
    check.same_device(name, **{label: X, "scales": scales})
