"""Stochastic rounding of bfloat16 weights: unbiased; random bits depend on seed and place alone.

Rounding to nearest loses updates smaller than half the distance of neighbouring bfloat16 numbers,
which is 2^-9 to 2^-8 of the weight. Instead x = (1-p) low + p high is rounded to `high` with
probability p (arXiv:2010.06192). A random number of 16 bits is added to x in float32, below the
bits that bfloat16 keeps; then the lower bits are cut off.

The random number of an element is a hash of the seed and of the element's place: its distance in
memory from the tensor's first element, in elements. So every backend draws the same numbers,
whatever else is in the list. Each step needs a new seed. The hash is Chris Wellons' lowbias32
(https://nullprogram.com/blog/2018/07/31), here on the low 32 bits of 64-bit integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio; it keeps a seed of 0 from having the key 0


def hashed(x: Tensor) -> Tensor:
    """Map x by a permutation of the integers below 2^32 that looks random."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW
    return x ^ (x >> 16)


def random_bits(seed: Tensor, places: Tensor) -> Tensor:
    """Return 16 random bits for every place, as int64 below 2^16."""
    key = hashed(hashed((seed & LOW) ^ GOLDEN) ^ ((seed >> 32) & LOW))
    folded = (places & LOW) ^ (((places >> 32) * GOLDEN) & LOW)
    return hashed(key ^ folded) & 0xFFFF


def places(x: Tensor) -> Tensor:
    """Return the distance in memory of every element from the first one, in elements."""
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        found = found.unsqueeze(-1) + torch.arange(size, device=x.device) * stride
    return found


def stochastic(x: Tensor, seed: Tensor, where: Tensor) -> Tensor:
    """Round x to float32 numbers that bfloat16 can hold; NaN stays NaN. `where` has the places."""
    near = x.to(torch.float32)
    random = random_bits(seed.to(x.device).reshape(()), where).to(torch.int32)
    bits = (near.view(torch.int32) + random) & -0x10000
    return torch.where(near.isnan(), near, bits.view(torch.float32))


def write(weight: Tensor, new: Tensor, seed: Tensor | None) -> None:
    """weight <- new, rounded to nearest; stochastically if it is bfloat16 and a seed is given."""
    if seed is not None and weight.dtype == torch.bfloat16:
        new = stochastic(new, seed, places(weight))
    weight.copy_(new)
