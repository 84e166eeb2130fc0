"""Timings that exist on CUDA devices only: with a cold L2 cache, of graphs, and of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .timing import quantile, repeats_of, time_cuda

SAMPLES = 20


def cold(call: Callable[[], Any], device: str) -> float:
    """Return the median seconds of a call that finds none of its data in the L2 cache.

    Before each call a buffer of twice the cache's size is written; only the call is timed.
    """
    size = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * size, dtype=torch.int8, device=device)
    times = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(float(start.elapsed_time(end)) * 1e-3)
    return quantile(times, 0.5)


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of a call; raise RuntimeError if it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replayed(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call replayed from a CUDA graph, time after time.

    One replay alone would be timed with the latency of its launch. Raise RuntimeError if the call
    cannot be captured.
    """
    graph = captured(call)
    graph.replay()
    repeats = repeats_of(time_cuda(graph.replay, 10))
    return quantile([time_cuda(graph.replay, repeats) for _ in range(SAMPLES)], 0.5)


def host(call: Callable[[], Any]) -> float:
    """Return the median seconds until a call returns to the host; the queue is empty before."""
    times = []
    for _ in range(SAMPLES):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) * 1e-9)
    torch.cuda.synchronize()
    return quantile(times, 0.5)
