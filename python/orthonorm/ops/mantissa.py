"""A float32 number in two halves: a bfloat16 weight and 16 bits beside it, exactly.

The weight is the number rounded to nearest, ties away from zero; the int16 `mantissa` is how far
the number's bits, as an integer, are above those of the weight. So weights of 2 bytes that
forward and backward read, and 2 bytes beside them, are updated as float32 weights are, to the
bit, where these and a bfloat16 copy take 6. (modded-nanogpt keeps the lower 16 bits themselves,
beside a weight that is cut off instead of rounded.) A mantissa of zeros is the weight as it is.
NaN keeps no payload. A zero that was written over a weight stays a zero or a denormal: what is
below it is no number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joined(weight: Tensor, mantissa: Tensor) -> Tensor:
    """The float32 number of both halves."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    low = mantissa.to(torch.int32)
    return (high + torch.where(weight == 0, low.clamp(min=0), low)).view(torch.float32)


def split_(weight: Tensor, mantissa: Tensor, number: Tensor) -> None:
    """Write a float32 number into its halves."""
    bits = number.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    nan = number.isnan()
    weight.view(torch.int16).copy_(torch.where(nan, 0x7FC0, high))
    mantissa.copy_(torch.where(nan, 0, bits - (high << 16)))
