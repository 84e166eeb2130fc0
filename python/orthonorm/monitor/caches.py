"""Norms of key and value caches, and the bits to quantize each cache with."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from .. import _checks as check
from ..ops.normalize import accumulator
from .norms import frobenius


def cache_norms(X: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_1, |X|_F) of every cache X, sigma_1^2 = lambda_1(X^T X), a Gram matrix of d_head.

    Args:
        X: keys or values, (batch, heads, tokens, d_head) or any leading dimensions.

    Returns: two tensors (...), float64 if X is, else float32. Cost: one product X^T X and an
    eigvalsh of d_head. Source: arXiv:2502.15075, which compares keys and values by both norms.
    """
    check.tensor("cache_norms", "X", X, 2)
    size = frobenius(X)
    A = X.detach().to(accumulator(X)) / torch.where(size == 0, 1.0, size)[..., None, None]
    finite = A.isfinite().flatten(-2).all(-1)
    G = torch.where(finite[..., None, None], A.mT @ A, 0.0)
    top = torch.linalg.eigvalsh(G)[..., -1].clamp(min=0).sqrt() * size
    return torch.where(finite, top, torch.nan), size


def kv_bits(norms: Tensor, mean_bits: float, low: int = 1, high: int = 8) -> Tensor:
    """Whole bits b_i minimizing sum_i norm_i^2 4^-b_i with mean b_i <= mean_bits.

    A uniform quantizer of b bits whose range is proportional to the norm has the squared error
    norm^2 4^-b. Caches of larger norm (usually the keys) get more bits: one for every factor of 2.
    Bits are given one at a time, always where the gain is largest. This is optimal, because each
    further bit of a cache gains less.

    Args:
        norms: Frobenius (or spectral) norms of caches of one size, in any shape, such as
            (layers, 2) for keys and values.
        mean_bits: largest average of bits per number of the caches, from `low` to `high`.
        low, high: fewest and most bits of one cache.

    Returns: int64, the shape of norms. Cost: a heap of the norms on the host. Source: the error
    bound behind arXiv:2502.15075.
    """
    name = "kv_bits"
    check.tensor(name, "norms", norms)
    check.integer(name, "low", low, 0)
    check.integer(name, "high", high, low)
    check.number(name, "mean_bits", mean_bits, low, high)
    flat = [float(x) for x in norms.detach().flatten()]
    if not all(0 <= x < float("inf") for x in flat):
        raise ValueError(f"{name}: norms must be finite and not negative, got {flat}")
    bits = [low] * len(flat)
    heap = [(-(x**2) * 4.0**-low, i) for i, x in enumerate(flat)] if high > low else []
    heapq.heapify(heap)
    for _ in range(int(mean_bits * len(flat) + 1e-9) - low * len(flat)):
        gain, i = heap[0]
        bits[i] += 1
        if bits[i] < high:
            heapq.heapreplace(heap, (gain / 4, i))
        else:
            heapq.heappop(heap)
    return torch.tensor(bits, dtype=torch.int64).view(norms.shape)
