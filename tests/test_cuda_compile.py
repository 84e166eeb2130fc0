"""CUDA kernels compiled by nvcc for GPUs that are not here, and what the machine code needs.

The committed table (`bench/results/cuda_compile.json`) must cover every source; where they have
just been compiled (`build/cuda`, as `.ci/run` does), it must say what the objects say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from orthonorm.bench import cuda_report as report

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
