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


@pytest.mark.parametrize(
    ("dtype", "skip", "regular"),
    [(torch.uint8, 24, False), (torch.uint8, 32, True), (torch.bfloat16, 4, False),
     (torch.bfloat16, 8, True), (torch.float32, 2, False), (torch.float32, 4, True),
     (torch.float64, 2, True)],
)  # fmt: skip
def test_what_is_promised_of_a_batch_is_in_bytes(
    dtype: torch.dtype, skip: int, regular: bool
) -> None:
    """Kernels are told that each matrix of a regular batch begins at a multiple of 16 bytes."""
    from orthonorm.kernels import tables

    assert tables.place(dtype, 2, 1, 8, (2**20, skip, 8, 1)).regular is regular


def test_what_is_kept_by_address_has_one_bound() -> None:
    """New addresses every step, as of gradients, must not fill the memory."""
    import orthonorm.kernels as package
    from orthonorm.kernels import tables

    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, f in vars(module).items():
            if hasattr(f, "cache_info") and f.__module__ == module.__name__:
                found[f"{info.name}.{name}"] = f
    views = {found.pop(f"tables.{name}").cache_info().maxsize for name in ("view", "place")}
    assert len(found) > 15 and views == {tables.VIEWS}
    for_devices = ("configs.", "probe.", "quantize_blocks.intervals_of")
    few = {k for k in found if k.startswith(for_devices)}
    bounded = tables.kept(bool).__wrapped__.__code__
    assert {f.__wrapped__.__code__ for k, f in found.items() if k not in few} == {bounded}
    assert tables.LAUNCHES <= 128 and tables.VIEWS <= 2**14 and tables.PARTS <= 2**16


def test_what_is_kept_is_bounded_by_what_it_holds() -> None:
    """Few large entries or many small ones stay; new ones without end do not."""
    from orthonorm.kernels import tables

    @tables.kept
    def total(numbers: tuple[int, ...], more: int = 0) -> int:
        return sum(numbers) + more

    def held(count: int, length: int, again: int = 1) -> int:
        total.cache_clear()
        for i in [*range(count)] * again:
            assert total((i,) * length, more=1) == i * length + 1
        return total.cache_info().currsize

    large = 2 * tables.PARTS // tables.LAUNCHES
    assert held(tables.LAUNCHES, large, again=2) == tables.LAUNCHES == total.cache_info().hits
    few = 20 * tables.LAUNCHES
    assert held(few, 9, again=2) == few == total.cache_info().hits
    assert held(few, large) <= tables.LAUNCHES


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
    "rounding", "iterations", "totals",
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
