"""The CUDA kernels, run on the CPU by the emulation in `csrc/tests/cuda_on_cpu`: `emulated_cuda.py`
and `emulated_clusters.py` in a process of their own, as they replace the CPU's kernels for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_on_the_cpu() -> None:
    environment = {**os.environ, "ORTHONORM_BACKEND": "reference"}
    command = [sys.executable, "-m", "pytest", "emulated_cuda.py", "emulated_clusters.py"]
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2_000:]
