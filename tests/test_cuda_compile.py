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
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes of a block (CUDA guide)
# Kernels of small sums, of double arithmetic (a division's slow path is a call) or of one number a
# thread: not what a step waits for.
NOT_HOT = (
    " results_kernel", "advance_kernel", "line_factors_kernel", " power_kernel", "double>"
)  # fmt: skip
# What every other kernel must have: 16-byte loads and stores, two for each list of floats and each
# run of eight that a thread has in flight, and products on tensor cores. None claims bulk copies
# (CONTRIBUTING says why).
NEEDS = {
    "elementwise_kernel<AdamWOp": (8, 6, 0),
    "elementwise_kernel<DecayedUpdateOp": (8, 4, 0),
    "elementwise_kernel<DivideEachOp": (4, 4, 0),
    "elementwise_kernel<ElementwiseMomentOp": (8, 8, 0),
    "elementwise_kernel<HalvesAdamWOp": (10, 8, 0),
    "elementwise_kernel<HalvesUpdateOp": (6, 4, 0),
    "elementwise_kernel<InnerOp": (8, 0, 0),
    "elementwise_kernel<MagnitudeOp": (4, 0, 0),
    "elementwise_kernel<MuonPrologueOp": (4, 4, 0),
    "elementwise_kernel<RotatedAdamOp": (6, 6, 0),
    "line_apply_kernel": (4, 4, 0),
    "line_norms_kernel": (8, 0, 0),
    "line_squares_kernel": (8, 0, 0),
    "power_sweep_kernel": (16, 2, 0),
    "small_power_kernel": (32, 4, 0),
    "small_gram_polynomial_kernel": (2, 2, 2),
    "small_newton_schulz_kernel": (2, 2, 6),
    "cluster_gram_polynomial_kernel": (2, 2, 16),
    "cluster_direct_polynomial_kernel": (2, 2, 32),
}


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
    """Hot kernels keep everything in registers and have the instructions they are meant to use."""
    assert row["shared"] <= SHARED[row["arch"]], row
    if any(part in f" {row['kernel']}" for part in NOT_HOT):
        return
    (needed,) = (counts for kernel, counts in NEEDS.items() if row["kernel"].startswith(kernel))
    assert row["stack"] == 0, row
    clusters = row["kernel"].startswith("cluster_")
    if clusters and row["arch"] == "sm_80":  # which has none: a trap
        assert row["registers"] <= 32 and row["tensor_cores"] == 0, row
        return
    found = tuple(row[count] for count in ("loads_16", "stores_16", "tensor_cores"))
    assert all(have >= least for have, least in zip(found, needed, strict=True)), row
    assert clusters == (row["cluster_barriers"] > 0), row
    assert not clusters or row["generic_16"] >= 8, row  # squares from other blocks


def test_kernels_that_are_needed_are_there() -> None:
    names = {row["kernel"] for row in ROWS}
    assert all(any(name.startswith(kernel) for name in names) for kernel in NEEDS)


@pytest.mark.skipif(not report.built(), reason="csrc/cuda has not been compiled here")
@pytest.mark.parametrize("source", report.sources(), ids=lambda s: s.stem)
def test_table_says_what_was_compiled(source: Path) -> None:
    assert report.rows(source) == [row for row in ROWS if row["op"] == source.stem]
