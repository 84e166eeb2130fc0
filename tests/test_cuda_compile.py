"""CUDA kernels compiled by nvcc for GPUs that are not here, and what the machine code needs.

The committed table (`bench/results/cuda_compile.json`) must cover every source; where they have
just been compiled (`build/cuda`, as `.ci/run` does), it must say what the objects say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from orthonorm.bench import cuda_report as report
from orthonorm.bench.compiled import CUDA_TILES, CUDA_WARPS, kernels

ROWS: list[dict[str, Any]] = json.loads(report.RESULTS.read_text())
SHARED = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448}  # bytes of a block (CUDA guide)
# Kernels of small sums, of double arithmetic (a division's slow path is a call) or of one number a
# thread: not what a step waits for.
NOT_HOT = (
    " results_kernel", "advance_kernel", "line_factors_kernel", " power_kernel", "double>"
)  # fmt: skip


def name(row: dict[str, Any]) -> str:
    return f"{row['op']}-{row['kernel']}-{row['arch']}"


def calls_others(source: Path) -> bool:
    """Whether an op leaves its launches to another source's."""
    return '#include "line_ops.h"' in source.read_text() and source.stem != "line_ops"


@pytest.mark.skipif(not report.sources(), reason="not run from a checkout")
def test_table_covers_every_source() -> None:
    kernels = {row["op"] for row in ROWS}
    assert kernels == {s.stem for s in report.sources() if not calls_others(s)}
    for op, kernel in {(row["op"], row["kernel"]) for row in ROWS}:
        arches = [r["arch"] for r in ROWS if (r["op"], r["kernel"]) == (op, kernel)]
        assert sorted(arches) == sorted(report.ARCHES)


@pytest.mark.skipif(not report.sources(), reason="not run from a checkout")
def test_tiles_are_the_sources() -> None:
    """What `bench static` takes for a block's share of a list."""
    folder = report.sources()[0].parent

    def constant(file: str, name: str) -> int:
        found = re.search(rf"\b{name} = (\d+)", (folder / file).read_text())
        assert found, (file, name)
        return int(found[1])

    threads = constant("elementwise.h", "threads")
    runs = re.search(r"runs = N <= (\d+) \? (\d+) : (\d+)", (folder / "elementwise.h").read_text())
    assert runs
    for op, tile in CUDA_TILES.items():
        if op == "line_ops":
            want = constant("lines.h", "tile_rows") * constant("lines.h", "tile_columns")
        elif op == "power_iteration_":
            want = constant("power_sweep.h", "power_rows")
        else:
            few, two, one = map(int, runs.groups())
            want = 8 * threads * (two if constant(f"{op}.h", "lists") <= few else one)
        assert tile == want, op
    for file, name in (("lines.h", "line_threads"), ("power_sweep.h", "power_threads")):
        assert constant(file, name) == threads == 32 * CUDA_WARPS
    assert {k.op for k in kernels() if k.language == "CUDA"} >= {"power-step", "row_moment"}


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_machine_code(row: dict[str, Any]) -> None:
    """Hot kernels keep everything in registers and move 16 bytes an access."""
    assert row["shared"] <= SHARED[row["arch"]], row
    if any(part in f" {row['kernel']}" for part in NOT_HOT):
        return
    assert row["stack"] == 0, row
    assert row["loads_16"] > 0, row


@pytest.mark.skipif(not report.built(), reason="csrc/cuda has not been compiled here")
@pytest.mark.parametrize("source", report.sources(), ids=lambda s: s.stem)
def test_table_says_what_was_compiled(source: Path) -> None:
    assert report.rows(source) == [row for row in ROWS if row["op"] == source.stem]
