"""Triton kernels run by Triton's interpreter, in a process of its own (`interpreted.py`).

The interpreter must be chosen before Triton is imported, and replaces compiled kernels for good.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ORTHONORM_BACKEND": "triton"}
    # its arithmetic on masked lanes and on planted NaN warns; one worker needs one thread
    command = ["-m", "pytest", "-W", "ignore::RuntimeWarning", "interpreted.py"]
    run = subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2_000:]


def test_kernels_are_found_by_the_names_of_ops() -> None:
    """A module of `kernels/` is either an op's or shared by several; none is orphaned."""
    from orthonorm import OPS, kernels

    shared = {"__init__", "tables", "tiles", "configs", "product", "elementwise", "lines", "probe"}
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    assert files - shared <= {name.rstrip("_") for name in OPS}
    leaves = {name.rstrip("_") for name, op in OPS.items() if not op.composite}
    assert leaves <= files
