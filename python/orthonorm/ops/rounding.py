"""Stochastic rounding of bfloat16 weights: unbiased, and a function of seed and place alone.

An update smaller than half the distance of neighbouring bfloat16 numbers (2^-9 to 2^-8 of it) is
lost by rounding to nearest. x = (1-p) low + p high is rounded to `high` with probability p instead
(arXiv:2010.06192): to x in float32, a random number of 16 bits is added below the bits that
bfloat16 keeps, which are then cut off.

The random number of an element is a hash of the seed and of the element's place, its distance in
memory from the tensor's first element, in elements. So every backend draws the same numbers, alone
or in any company; another step wants another seed. The hash is Chris Wellons' lowbias32
(https://nullprogram.com/blog/2018/07/31); on integers of 64 bits here, of which it uses the low 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: 0 is no fixed point of the key


def hashed(x: Tensor) -> Tensor:
    """A permutation of the integers below 2^32 that looks random."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW
    return x ^ (x >> 16)


def random_bits(seed: Tensor, places: Tensor) -> Tensor:
    """16 bits for every place."""
    key = hashed(hashed((seed & LOW) ^ GOLDEN) ^ ((seed >> 32) & LOW))
    folded = (places & LOW) ^ (((places >> 32) * GOLDEN) & LOW)
    return hashed(key ^ folded) & 0xFFFF


def places(x: Tensor) -> Tensor:
    """How far in memory every element is from the first one."""
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        found = found.unsqueeze(-1) + torch.arange(size, device=x.device) * stride
    return found


def stochastic(x: Tensor, seed: Tensor, where: Tensor) -> Tensor:
    """x as float32 numbers that bfloat16 has; NaN stays NaN."""
    near = x.to(torch.float32)
    random = random_bits(seed.to(x.device).reshape(()), where).to(torch.int32)
    bits = (near.view(torch.int32) + random) & -0x10000
    return torch.where(near.isnan(), near, bits.view(torch.float32))


def write(weight: Tensor, new: Tensor, seed: Tensor | None) -> None:
    """weight <- new, rounded to nearest; stochastically if there is a seed and bfloat16 to save."""
    if seed is not None and weight.dtype == torch.bfloat16:
        new = stochastic(new, seed, places(weight))
    weight.copy_(new)
