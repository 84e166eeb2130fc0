"""Registration and loading: what serves an op, references beside kernels, show-config."""

from __future__ import annotations

import os
import subprocess
import sys

import orthonorm
import pytest
import torch
from orthonorm import LOADED, OPS, ops
from orthonorm.__main__ import main, serving

KELLER = [3.4445, -4.7750, 2.0315] * 5


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_every_op_is_exported_and_documented() -> None:
    assert set(ops.__all__) == set(OPS)
    for name, op in OPS.items():
        assert getattr(ops, name) is op
        assert op.__doc__ and op.schema.startswith(f"{name}(")
        assert getattr(torch.ops.orthonorm, name).default is op.overload


def test_every_leaf_op_has_a_cpu_kernel_where_the_library_is_built() -> None:
    if LOADED.libraries["_C.so"] != "loaded":
        pytest.skip(f"_C.so: {LOADED.libraries['_C.so']}")
    served = {name for name, key in LOADED.served if key == "CPU"}
    assert served >= {name for name, op in OPS.items() if not op.composite}
    assert serving("gram", "CPU") == ("C++", "kernel loaded")


def test_reference_mode_replaces_kernels_inside_composites() -> None:
    X = [torch.randn(3, 20, 30), torch.randn(150, 200)]
    wanted = ops.newton_schulz.reference(X, KELLER, [])
    with orthonorm.reference():
        got = ops.newton_schulz(X, KELLER, [])
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    calls = []
    body = OPS["gram"]._body
    try:
        OPS["gram"]._body = lambda X: calls.append(1) or body(X)
        ops.newton_schulz.reference([torch.randn(150, 200)], KELLER, [], "direct")
    finally:
        OPS["gram"]._body = body
    assert len(calls) == 5


def test_backend_variable() -> None:
    code = "import orthonorm as o; print(o.LOADED.libraries['_C.so'], len(o.LOADED.served))"
    off = run(code, ORTHONORM_BACKEND="reference")
    assert off.stdout.strip() == "not loaded: ORTHONORM_BACKEND=reference 0"
    bad = run(code, ORTHONORM_BACKEND="fast")
    assert bad.returncode == 1
    assert "ORTHONORM_BACKEND must be one of" in bad.stderr and "'fast'" in bad.stderr


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and orthonorm.__version__ in text
    assert all(name in text for name in [*OPS, "_C.so", "_C_cuda.so"])
    assert main(["--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| op ") and len(table) == 2 + len(OPS)


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benhc"])
    assert stop.value.code == 2 and "benhc" in capsys.readouterr().err
