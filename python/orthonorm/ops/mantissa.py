"""A float32 number in two halves, without loss: a bfloat16 weight and 16 bits beside it.

The weight is the number rounded to nearest, ties away from zero. The int16 `mantissa` is the
number's bits, as an integer, minus those of the weight. Forward and backward read the weights, of
2 bytes. With the 2 bytes of their mantissas they are updated as float32 weights are, to the bit;
float32 weights and a bfloat16 copy take 6. (modded-nanogpt stores the lower 16 bits themselves,
beside a weight that is truncated instead of rounded.) With mantissa 0 the number is the weight.
NaN keeps no payload. If someone writes a zero over a weight, a negative mantissa counts as 0, so
that the number stays a zero or a denormal: no number has bits below those of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joined(weight: Tensor, mantissa: Tensor) -> Tensor:
    """Return the float32 number of both halves."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    low = mantissa.to(torch.int32)
    return (high + torch.where(weight == 0, low.clamp(min=0), low)).view(torch.float32)


def split_(weight: Tensor, mantissa: Tensor, number: Tensor) -> None:
    """Split a float32 number, and write its halves into `weight` and `mantissa`."""
    bits = number.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    nan = number.isnan()
    weight.view(torch.int16).copy_(torch.where(nan, 0x7FC0, high))
    mantissa.copy_(torch.where(nan, 0, bits - (high << 16)))
