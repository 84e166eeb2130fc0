"""Timing: candidates interleaved in rounds, medians with their spread, ratios within rounds.

Other work on the machine slows everything for a while. So every candidate runs once per round, in
rotating order, and ratios are taken between medians and also round by round. A timed region
contains the calls and two clock readings (about 0.1 us), nothing else.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
SAMPLE = 2e-4  # least seconds of a sample; shorter calls are repeated within it
FEW = 3  # rounds of a candidate that alone would take more than the plan's time
SETTLED = 0.003  # relative standard error of a median below which measuring stops


class Stats(NamedTuple):
    """Seconds per call: their statistics over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int
    drift: float  # median of the later half of the rounds over that of the earlier, minus 1


class Plan(NamedTuple):
    """Length of a measurement: fixed `rounds`, or as many as fit `seconds`, from low to high."""

    rounds: int | None = None
    seconds: float = 5.0
    low: int = 5
    high: int = 200

    def choose(self, round_seconds: float) -> int:
        """Return the number of rounds, given the seconds of one."""
        if self.rounds is not None:
            return self.rounds
        return min(self.high, max(self.low, int(self.seconds / max(round_seconds, 1e-9))))


def quantile(values: Sequence[float], q: float) -> float:
    """Return a quantile by linear interpolation between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def stats(samples: Sequence[float]) -> Stats:
    """Return the statistics of samples in the order of rounds."""
    half = len(samples) // 2
    drift = quantile(samples[-half:], 0.5) / quantile(samples[:half], 0.5) - 1 if half else 0.0
    at = (quantile(samples, q) for q in (0.5, 0.1, 0.9))
    return Stats(*at, rounds=len(samples), drift=drift)


def settled(samples: Sequence[float]) -> bool:
    """True if the median's standard error, 0.93 IQR / sqrt(rounds), is below SETTLED of it."""
    spread = quantile(samples, 0.75) - quantile(samples, 0.25)
    return 0.93 * spread / math.sqrt(len(samples)) < SETTLED * quantile(samples, 0.5)


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median of a over the median of b."""
    return quantile(a, 0.5) / quantile(b, 0.5)


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median of a / b over the rounds that both ran.

    Other work that slows a whole round cancels.
    """
    return quantile([x / y for x, y in zip(a, b, strict=False)], 0.5)


def time_cpu(call: Call, repeats: int) -> float:
    """Return the seconds per call by the wall clock."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / repeats


def time_cuda(call: Call, repeats: int) -> float:
    """Return the seconds per call between two events; the queue of the stream is empty before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / repeats


def repeats_of(once: float) -> int:
    """Return how often to repeat a call of so many seconds, for a sample of SAMPLE."""
    return max(1, min(10_000, math.ceil(SAMPLE / max(once, 1e-7))))


def interleave(
    candidates: Mapping[str, Call],
    plan: Plan | None = None,
    device: str = "cpu",
    warm: bool = False,
) -> dict[str, list[float]]:
    """Time candidates in rounds; return the seconds per call of each in every round.

    Each candidate has two warm-up calls, or one if they are `warm`. The last is timed, to choose
    repeats and rounds. Round r starts with candidate r mod n, so the order rotates. If the plan
    does not fix the rounds, a candidate too slow for it runs only in the first few, and all stop
    once the median of every other one has settled.
    """
    clock = time_cuda if device.startswith("cuda") else time_cpu
    plan = plan or Plan()
    repeats: dict[str, int] = {}
    costs: dict[str, float] = {}
    for name, call in candidates.items():
        if not warm:
            call()
        once = clock(call, 1)
        repeats[name] = repeats_of(once)
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
    """Return the seconds that timing adds to a call: two clock readings and the loop."""
    return min(time_cpu(lambda: None, 1) for _ in range(1000))
