"""Timing: candidates interleaved in rounds, medians with their spread, ratios within rounds.

Neighbours on the machine slow everything for a while; so every candidate runs once per round, in an
order that rotates, and ratios are taken between medians and also round by round. Nothing but the
calls and two clock readings lies inside a timed region (about 0.1 us).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
NOISY = 1.25  # p90 / p10 above this is flagged
SAMPLE = 2e-4  # seconds: shorter calls are repeated within one sample


class Stats(NamedTuple):
    """Seconds per call over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int

    @property
    def noisy(self) -> bool:
        return self.p90 > NOISY * self.p10


class Plan(NamedTuple):
    """How long to measure: fixed `rounds`, or what fits `seconds` between two limits."""

    rounds: int | None = None
    seconds: float = 5.0
    low: int = 5
    high: int = 200

    def choose(self, round_seconds: float) -> int:
        if self.rounds is not None:
            return self.rounds
        return min(self.high, max(self.low, int(self.seconds / max(round_seconds, 1e-9))))


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def stats(samples: Sequence[float]) -> Stats:
    return Stats(
        quantile(samples, 0.5), quantile(samples, 0.1), quantile(samples, 0.9), len(samples)
    )


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> float:
    return quantile(a, 0.5) / quantile(b, 0.5)


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a / b: neighbours that slow a whole round cancel."""
    return quantile([x / y for x, y in zip(a, b, strict=True)], 0.5)


def time_cpu(call: Call, repeats: int) -> float:
    """Seconds per call by the wall clock."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / repeats


def time_cuda(call: Call, repeats: int) -> float:
    """Seconds per call between two events on the current stream; the queue is empty before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / repeats


def interleave(
    candidates: Mapping[str, Call], plan: Plan | None = None, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of every candidate in every round.

    Two warm-up calls each (the second one timed, to choose repeats and rounds), then round-robin:
    round r starts with candidate r mod n, so nobody always runs after the same neighbour.
    """
    clock = time_cuda if device.startswith("cuda") else time_cpu
    plan = plan or Plan()
    repeats: dict[str, int] = {}
    total = 0.0
    for name, call in candidates.items():
        call()
        once = clock(call, 1)
        repeats[name] = max(1, min(10_000, math.ceil(SAMPLE / max(once, 1e-7))))
        total += once * repeats[name]
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(plan.choose(total)):
            at = r % max(1, len(names))
            for name in names[at:] + names[:at]:
                samples[name].append(clock(candidates[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return samples
