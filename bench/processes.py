"""Repeats in fresh processes: what a process happens to get (addresses, cores) varies too.

Each process runs the same command with one thread per core, pinned, and writes its run; the joined
median is the median of theirs, p10 and p90 span all of them, and drift is how far they are apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .records import Record, Run, load
from .timing import quantile

PINNED = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}  # OpenMP 5.0, 6.3 and 6.5


def repeat(argv: Sequence[str], count: int, threads: int | None) -> tuple[Run, int]:
    """The joined run of `count` processes, and the worst exit code; what an interrupt leaves is
    joined too. RuntimeError if no process wrote anything."""
    environment = os.environ | PINNED | {"OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    runs: list[Run] = []
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            path = Path(folder, f"{i}.json")
            command = [sys.executable, "-m", "orthonorm", "bench", *argv]
            command += ["--processes", "0", "--worker", str(path)]
            print(f"process {i + 1} of {count}", file=sys.stderr, flush=True)
            child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            try:
                code = child.wait()
            except KeyboardInterrupt:
                code = max(child.wait(), 130)  # it had the same signal and keeps what it measured
            if path.exists():
                runs.append(load(path))
            worst = max(worst, abs(code))
            if code not in (0, 1):
                break
    if not runs:
        raise RuntimeError("bench: no process measured anything; run without --processes to see")
    return joined(runs), worst


def joined(runs: Sequence[Run]) -> Run:
    """Several runs of one command as one."""
    by_key: dict[tuple[str, ...], list[Record]] = {}
    for run in runs:
        for record in run.records:
            by_key.setdefault(record.key, []).append(record)
    rates = [run.ceilings for run in runs]
    ceilings = {name: max(r.get(name, 0.0) for r in rates) for name in rates[0]}
    environment = runs[0].environment | {"processes": len(runs)}
    return Run(environment, ceilings, [_join(records) for records in by_key.values()])


def _join(records: Sequence[Record]) -> Record:
    timed = [r for r in records if r.median_ms and r.p10_ms and r.p90_ms]
    if not timed:
        return records[0]
    medians = [r.median_ms or 0.0 for r in timed]
    ratios = [r.ratio for r in timed if r.ratio]
    rounds = [r.round_ratio for r in timed if r.round_ratio]
    reached = [r.of_ceiling for r in timed if r.of_ceiling]
    return replace(
        timed[0], median_ms=quantile(medians, 0.5), p10_ms=min(r.p10_ms or 0.0 for r in timed),
        p90_ms=max(r.p90_ms or 0.0 for r in timed), rounds=sum(r.rounds or 0 for r in timed),
        drift=max(medians) / min(medians) - 1,
        ratio=quantile(ratios, 0.5) if ratios else None,
        round_ratio=quantile(rounds, 0.5) if rounds else None,
        of_ceiling=quantile(reached, 0.5) if reached else None,
    )  # fmt: skip
