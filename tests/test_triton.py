"""Triton kernels run by Triton's interpreter, in a process of its own (`interpreted.py`).

The interpreter must be chosen before Triton is imported, and replaces compiled kernels for good.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import struct
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from orthonorm import OPS, kernels

if sys.platform != "linux":  # there the dev extra installs it, and its absence is an error
    pytest.skip("Triton is published for Linux only", allow_module_level=True)


def passes(file: str, **settings: str) -> None:
    """The tests of a file, in a process of their own."""
    environment = {**os.environ, **settings, "ORTHONORM_BACKEND": "triton"}
    # the interpreter's arithmetic on masked lanes and on planted NaN warns
    command = ["-m", "pytest", "-W", "ignore::RuntimeWarning", file]
    run = subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2_000:]


def test_kernels_in_the_interpreter() -> None:
    passes("interpreted.py", TRITON_INTERPRET="1")


def test_what_is_kept_by_address_has_one_bound() -> None:
    """New addresses every step, as of gradients, must not fill the memory."""
    import orthonorm.kernels as package
    from orthonorm.kernels import tables

    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, f in vars(module).items():
            if hasattr(f, "cache_info") and f.__module__ == module.__name__:
                found[f"{info.name}.{name}"] = f.cache_info().maxsize
    views = {"tables.view": tables.VIEWS, "tables.place": tables.VIEWS}
    assert len(found) > 15 and {k: found.pop(k) for k in views} == views
    few = {k for k, n in found.items() if k.startswith(("configs.", "probe."))}
    assert {n for k, n in found.items() if k not in few} == {tables.LAUNCHES}
    assert tables.LAUNCHES <= 128 and tables.VIEWS <= 2**14


def test_a_table_that_is_dropped_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthonorm.kernels import tables

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(tables, "copied", lambda values, device: torch.tensor(values))
    entries = tables.Entries([(1, 4096, 3)])
    table = entries.table((0.5,), torch.device("cuda"))
    data = table.data
    assert data is table.data and data.tolist() == [tables.bits(0.5), 0, 4096, 3]
    kept = weakref.ref(data)
    del data, table, entries
    gc.collect()
    assert kept() is None


def test_tables_of_addresses_are_told_apart() -> None:
    """Among a table's numbers they are denormals, which a process may flush to zero."""
    from orthonorm.kernels import tables

    entries = tables.Entries([(1, 4096, 3)])
    torch.set_flush_denormal(True)
    try:
        made = [
            entries.table((1.0, tables.number(address)), torch.device("cpu"))
            for address in (0, 0x7F0012345600, 0x7F00ABCDEF00)
        ]
    finally:
        torch.set_flush_denormal(False)
    assert [int(t.data[1]) for t in made] == [0, 0x7F0012345600, 0x7F00ABCDEF00]


SHARED = {
    "__init__", "tables", "tiles", "configs", "product", "ends", "elementwise", "lines", "probe",
    "rounding", "iterations",
}  # fmt: skip


def test_kernels_are_named_after_ops() -> None:
    """Every leaf op has a module of its name, and every other module is shared by several."""
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    assert files - SHARED <= {name.rstrip("_") for name in OPS}
    assert {name.rstrip("_") for name, op in OPS.items() if not op.composite} <= files


@pytest.mark.parametrize("squares", ["11111", "00000", "1", "0", "01011", "1110"])
def test_steps_of_a_chain_are_the_polynomial(squares: str) -> None:
    """In order, by four buffers, none of which is read where it is written, and R is kept."""
    from orthonorm.kernels.gram_polynomial import schedule

    R = torch.diag(torch.linspace(0.1, 0.9, 3, dtype=torch.float64))
    abc = [(1.5 + t, -0.5 - t, 0.25 * int(c)) for t, c in enumerate(squares)]
    memory = {1: R}
    for _, depth, *numbers, to, C, A, B, n in schedule(1, 2, (3, 4, 5, 6), 3, abc):
        assert to not in (1, C, A, B) and to in range(2, 7) and n == 3
        alpha, beta, gamma = (struct.unpack("<d", struct.pack("<q", k))[0] for k in numbers)
        whole = memory[A] @ memory[B] if depth else torch.zeros(3, 3)
        memory[to] = alpha * (whole + gamma * torch.eye(3)) + beta * memory[C]
    want = OPS["gram_polynomial"].reference(R, [k for triple in abc for k in triple])
    torch.testing.assert_close(memory[2], want, rtol=1e-12, atol=1e-12)


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
