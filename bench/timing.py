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
SAMPLE = 2e-4  # seconds: shorter calls are repeated within one sample
FEW = 3  # rounds of a candidate that alone would take more than the plan's time
SETTLED = 0.003  # standard error of a median below which more rounds tell nothing


class Stats(NamedTuple):
    """Seconds per call over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int
    drift: float  # median of the later half of the rounds over that of the earlier, minus 1


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
    half = len(samples) // 2
    drift = quantile(samples[-half:], 0.5) / quantile(samples[:half], 0.5) - 1 if half else 0.0
    at = (quantile(samples, q) for q in (0.5, 0.1, 0.9))
    return Stats(*at, rounds=len(samples), drift=drift)


def settled(samples: Sequence[float]) -> bool:
    """Whether the median is known well: 0.93 IQR / sqrt(rounds) is its standard error."""
    spread = quantile(samples, 0.75) - quantile(samples, 0.25)
    return 0.93 * spread / math.sqrt(len(samples)) < SETTLED * quantile(samples, 0.5)


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> float:
    return quantile(a, 0.5) / quantile(b, 0.5)


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds both ran of a / b: neighbours that slow a whole round cancel."""
    return quantile([x / y for x, y in zip(a, b, strict=False)], 0.5)


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
    candidates: Mapping[str, Call],
    plan: Plan | None = None,
    device: str = "cpu",
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every candidate in every round.

    Two warm-up calls each, or one if they are `warm` (the last one timed, to choose repeats and
    rounds), then round-robin: round r starts with candidate r mod n, so nobody always runs after
    the same neighbour. Where the plan leaves the rounds open, a candidate too slow for it runs in
    the first few only, and all stop when every median has settled.
    """
    clock = time_cuda if device.startswith("cuda") else time_cpu
    plan = plan or Plan()
    repeats: dict[str, int] = {}
    costs: dict[str, float] = {}
    for name, call in candidates.items():
        if not warm:
            call()
        once = clock(call, 1)
        repeats[name] = max(1, min(10_000, math.ceil(SAMPLE / max(once, 1e-7))))
        costs[name] = once * repeats[name]
    slow = {
        n for n, cost in costs.items() if plan.rounds is None and plan.low * cost > plan.seconds
    }
    rounds = plan.choose(sum(cost for name, cost in costs.items() if name not in slow))
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            at = r % max(1, len(names))
            for name in names[at:] + names[:at]:
                if r < FEW or name not in slow:
                    samples[name].append(clock(candidates[name], repeats[name]))
            fast = [samples[name] for name in names if name not in slow]
            if plan.rounds is None and r % 16 == 15 and all(settled(s) for s in fast):
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def overhead() -> float:
    """Seconds that timing one call adds to it: two clock readings and the loop."""
    return min(time_cpu(lambda: None, 1) for _ in range(1000))
