"""Ceilings: the best rates of this machine, measured in the same run as the results.

Copy bandwidth counts the bytes read and the bytes written. Product rates are torch's best on
square matrices of normal entries (other entries may draw less power and run faster).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .inputs import DTYPES
from .timing import time_cpu, time_cuda

COPY = "copy"
FASTEST = "fastest"  # the highest product rate, for kernels that may choose their dtype
ROUNDS = 5


def _products(side: int, dtype: torch.dtype, device: str) -> Iterator[Callable[[], Any]]:
    """Yield ways to multiply two square matrices."""
    A, B = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(A)
    yield functools.partial(torch.mm, A, B, out=out)
    if device == "cpu" and dtype == torch.float32:  # oneDNN's product, which torch.mm may not use
        yield lambda: torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], "")


def _best(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest of a few calls, because a ceiling is a best case."""
    clock = time_cuda if device.startswith("cuda") else time_cpu
    call()
    return min(clock(call, 1) for _ in range(ROUNDS))


@functools.lru_cache
def measured(device: str = "cpu", threads: int = 0, small: bool = False) -> dict[str, float]:
    """Measure the ceilings: bytes per second of a copy, FLOP/s of products by dtype name.

    Measured once per process, device and number of threads. `small` takes a few milliseconds, for
    tests.
    """
    on_gpu = device.startswith("cuda")
    side = 128 if small else 8192 if on_gpu else 1536
    numel = 2**16 if small else 2**28 if on_gpu else 2**26  # a copy far larger than any cache
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    found = {COPY: 2.0 * numel * source.element_size() / seconds}
    for name, dtype in DTYPES.items():
        if dtype == torch.float16 and not on_gpu:
            continue  # torch has no fast float16 product on CPUs: 1-55 GFLOP/s (2026-11)
        try:
            best = min(_best(call, device) for call in _products(side, dtype, device))
        except (RuntimeError, AttributeError):
            continue  # this device has no such product
        found[name] = 2.0 * side**3 / best
    return found


def allowed(
    flops: float, traffic: float, dtype: str, ceilings: Mapping[str, float]
) -> tuple[str, float]:
    """Return (name, seconds): the ceiling that binds this work, and the time it allows.

    The name is "memory" or a dtype of products; ("", 0) if the ceilings are unknown.
    """
    products = {k: v for k, v in ceilings.items() if k != COPY}
    if dtype == FASTEST and products:
        dtype = max(products, key=lambda name: products[name])
    bounds = []
    if traffic and COPY in ceilings:
        bounds.append((traffic / ceilings[COPY], "memory"))
    if flops and dtype in products:
        bounds.append((flops / products[dtype], dtype))
    seconds, name = max(bounds, default=(0.0, ""))
    return name, seconds
