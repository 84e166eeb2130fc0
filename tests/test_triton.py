"""Triton kernels run by Triton's interpreter, in a process of its own (`interpreted.py`).

The interpreter must be chosen before Triton is imported, and replaces compiled kernels for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from orthonorm import OPS, kernels

if sys.platform != "linux":  # there the dev extra installs it, and its absence is an error
    pytest.skip("Triton is published for Linux only", allow_module_level=True)


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


SHARED = {
    "__init__", "tables", "tiles", "configs", "product", "ends", "elementwise", "lines", "probe",
    "rounding",
}  # fmt: skip


def test_kernels_are_named_after_ops() -> None:
    """Every leaf op has a module of its name, and every other module is shared by several."""
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    assert files - SHARED <= {name.rstrip("_") for name in OPS}
    assert {name.rstrip("_") for name, op in OPS.items() if not op.composite} <= files


def test_where_triton_cannot_compile_definitions_serve(tmp_path: Path) -> None:
    """It says so once, and why; here because there is no CUDA device to launch on."""
    code = """
import warnings, torch
from orthonorm import LOADED, OPS, _library
lazy = _library._Lazy(OPS["gram"], "orthonorm.kernels.gram")
X = torch.randn(3, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(lazy(X), OPS["gram"].reference(X))
told = [str(w.message) for w in caught if "orthonorm" in str(w.message)]
assert len(told) == 1 and "cannot compile" in told[0], told
assert "cannot compile" in LOADED.libraries["Triton"]
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
