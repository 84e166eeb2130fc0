"""Numbers kept in 8 bits by block-wise dynamic codes (arXiv:2110.02861).

Every BLOCK elements of a matrix, row by row, share a scale, their largest absolute value. A stored
element is the scale times the nearest of 256 values in [-1, 1] (`values`, the map of bitsandbytes'
create_dynamic_map). The last block of a matrix may be shorter. No block spans two matrices, so that
NaN stays in its own matrix. Second moments, which are not negative, use 256 values in [0, 1].
Positive ones are never rounded to 0 there, since a step divides by their roots.
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

BLOCK = 256  # elements; the 4 bytes of their scale are 1/64 byte per element


@functools.cache
def values(signed: bool) -> list[float]:
    """Return the 256 values in order: 0, 1 and the points of seven decades.

    Each decade has twice as many points as the one below it; unsigned, each has twice as many as
    signed ones have of one sign.
    """
    found = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        means = [0.1 + 0.9 * (k + 0.5) / count for k in range(count)]
        found += [10.0 ** (i - 6) * mean for mean in means]
        found += [-(10.0 ** (i - 6)) * mean for mean in means if signed]
    return sorted(found)


@functools.cache
def table_of(signed: bool, device: torch.device) -> Tensor:
    """Return `values` on a device, from a cache: the copy waits, and cannot be in a CUDA graph."""
    return torch.tensor(values(signed), dtype=torch.float32, device=device)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of matrices (..., m, n)."""
    return (*shape[:-2], blocks_in(shape[-2:]))


def blocks_in(shape: Sequence[int]) -> int:
    """Return the number of blocks that elements of this shape are cut into."""
    return -(-math.prod(shape) // BLOCK)


@op("quantize_blocks_(Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] X, bool signed=True) -> ()")
def quantize_blocks_(
    codes: list[Tensor], scales: list[Tensor], X: list[Tensor], signed: bool = True
) -> None:
    """scale <- max |x| of every BLOCK elements, codes <- argmin_c |x / scale - values(signed)_c|.

    x / scale is taken in float32. Its code is the number of midpoints of neighbouring values below
    it, so a tie takes the lower code. A block of zeros has the scale 0 and the code of 0. A NaN has
    the code 255, and its block the scale NaN. With `signed=False`, positive x have codes above 0.

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
    `quantize_blocks_` writes them. Source: arXiv:2110.02861.
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
    """Return the elements of all matrices in rows of BLOCK, each matrix padded with zeros."""
    size = t.shape[-2] * t.shape[-1]
    return F.pad(t.flatten(-2), (0, -size % BLOCK)).reshape(-1, BLOCK)


def by_scales(t: Tensor, scales: Tensor) -> Tensor:
    """View a tensor (*batch, ...) as matrices of one row, whose scales are (*batch, blocks)."""
    batch = scales.dim() - 1
    return t.reshape(*t.shape[:batch], 1, math.prod(t.shape[batch:]))


def unblocked(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return matrices of the shapes of `like` from their blocks: the reverse of `blocks`."""
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
    check_codes(name, "codes", codes)
    check.tensors(name, "scales", scales)
    check.same_shapes(name, **{label: X, "codes": codes})
    check.same_lengths(name, **{label: X, "scales": scales})
    for i, (x, s) in enumerate(zip(X, scales, strict=True)):
        check.equal_shape(name, f"scales[{i}]", s, scales_shape(x.shape))
    check.same_device(name, **{label: X, "scales": scales})


def check_codes(name: str, label: str, codes: list[Tensor]) -> None:
    if not isinstance(codes, (list, tuple)):
        raise TypeError(f"{name}: {label} must be a list of tensors, got {type(codes).__name__}")
    for i, c in enumerate(codes):
        if not isinstance(c, Tensor) or c.layout != torch.strided or c.dtype != torch.uint8:
            got = f"{c.dtype}, {c.layout}" if isinstance(c, Tensor) else type(c).__name__
            raise TypeError(f"{name}: {label}[{i}] must be a dense uint8 Tensor, got {got}")
