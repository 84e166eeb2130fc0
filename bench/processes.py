"""Repeats in fresh processes, because addresses and cores differ from process to process.

Each process runs the same command with one thread per core, pinned, and writes its run.
`records.joined` joins these.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .records import Run, joined, load

PINNED = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}  # OpenMP 5.0, 6.3 and 6.5


def repeat(argv: Sequence[str], count: int, threads: int | None) -> tuple[Run, int]:
    """Run `count` processes; return their joined run and the worst exit code.

    After an interrupt the runs so far are joined. Raise RuntimeError if no process wrote a run.
    """
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
                code = max(child.wait(), 130)  # the child got the same signal and saves its run
            if path.exists():
                runs.append(load(path))
            worst = max(worst, abs(code))
            if code not in (0, 1):
                break
    if not runs:
        raise RuntimeError("bench: no process measured anything; run without --processes to see")
    return joined(runs), worst
