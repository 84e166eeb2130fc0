"""Compiled GPU kernels from the committed reports, and their occupancy on a GPU.

`triton_report` writes `bench/results/triton_compile.json`, and `cuda_report` writes
`cuda_compile.json`. Registers, spills, shared memory and instructions are the compilers' own
figures; occupancy follows from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "results"
WARP = 32


class Device(NamedTuple):
    """Datasheet of a GPU: multiprocessors, dense FLOP/s by dtype, bytes per second.

    The others are limits of a multiprocessor (CUDA C++ programming guide, table of compute
    capabilities).
    """

    name: str
    processors: int
    half: float
    single: float
    memory: float
    shared: int
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536

    def rate(self, dtype: str) -> float:
        return self.single if dtype == "float32" else self.half


DEVICES = {
    "80": Device("A100 SXM 80 GB", 108, 312e12, 19.5e12, 2.039e12, 164 * 1024),
    "90": Device("H100 SXM", 132, 989.4e12, 66.9e12, 3.35e12, 228 * 1024),
    "100": Device("B200", 148, 2250e12, 75e12, 8.0e12, 228 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel of the reports; `op` is Triton's name for the op that it serves."""

    language: str
    name: str
    op: str
    arch: str
    dtype: str
    blocks: tuple[int, ...]
    warps: int
    registers: int
    shared: int
    spills: int
    mix: dict[str, int] = field(hash=False)

    def resident(self, device: Device) -> int:
        """Return how many blocks a multiprocessor holds.

        Registers are allocated in units of 256 per warp. From sm_80 on the system takes 1 KiB of
        shared memory per block.
        """
        per_warp = 256 * math.ceil(max(self.registers, 1) * WARP / 256)
        return min(
            device.blocks,
            device.threads // (WARP * self.warps),
            device.registers // (per_warp * self.warps),
            device.shared // (self.shared + 1024),
        )

    def occupancy(self, device: Device) -> float:
        return self.resident(device) * self.warps * WARP / device.threads


# ops whose hot kernel has another name in Triton's report
TRITON_NAMES = {
    "power_iteration_": "power-step",
    "column_moment_": "column_moment_across",
    "column_normalize": "column_normalize_across",
}


def triton_name(op: str) -> str:
    """Return the name of an op in Triton's report."""
    return TRITON_NAMES.get(op, op.rstrip("_"))


def triton(row: dict[str, Any]) -> Kernel:
    """Return the kernel of a row of Triton's report, whose name is op-dtype-blocks-sm_arch."""
    head, _, arch = row["name"].rpartition("-sm_")
    op, dtype, blocks = head.rsplit("-", 2)
    sizes = tuple(int(b) for b in blocks.split("x")) if blocks else ()
    return Kernel("Triton", row["name"], op, arch, dtype, sizes, row["warps"], row["registers"],
                  row["shared"], row["spills"], row["mix"])  # fmt: skip


# ops in which one Triton program owns whole rows ("across": columns), whatever their length
LINES = (
    "row_moment", "column_moment_across", "factored_moment", "row_normalize",
    "column_normalize_across", "power-step",
)  # fmt: skip

# launches of csrc/cuda, which tests/test_cuda_compile.py checks: warps of a block, and by op the
# elements of its tile (power iteration: rows)
CUDA_WARPS = 8
CUDA_TILES = {"adamw_step_": 2048, "rotated_adam_": 2048, "muon_prologue_": 2048,
              "decayed_update_": 4096, "divide_each": 4096, "magnitude": 4096,
              "elementwise_moment_": 4096, "inner": 4096,
              "line_ops": 128 * 256, "power_iteration_": 32}  # fmt: skip
CUDA_HOT = ("elementwise_kernel", "line_apply_kernel", "power_sweep_kernel")
ARITHMETIC = {"float": ("float32", "bfloat16", "float16"), "double": ("float64",)}
LINE_OPS = ("row_moment_", "column_moment_", "factored_moment_", "row_normalize",
            "column_normalize")  # fmt: skip


def cuda(row: dict[str, Any]) -> Iterator[Kernel]:
    """Yield a kernel for every op and dtype that a row of nvcc's report serves.

    Kernels that reduce a few numbers are left out. So are those of halves, of which Triton has only
    AdamW's.
    """
    function, _, arguments = row["kernel"].rstrip(">").partition("<")
    if function not in CUDA_HOT or "Halves" in arguments:
        return
    arch = row["arch"].removeprefix("sm_").removesuffix("a")
    name = f"{row['op']}-{row['kernel']}-{row['arch']}"
    tile = (CUDA_TILES[row["op"]],)
    for op in LINE_OPS if row["op"] == "line_ops" else (row["op"],):
        for dtype in ARITHMETIC[arguments.rpartition(" ")[2]]:
            yield Kernel("CUDA", name, triton_name(op), arch, dtype, tile, CUDA_WARPS,
                         row["registers"], row["shared"], row["stack"], row["mix"])  # fmt: skip


def kernels(folder: Path = FOLDER) -> list[Kernel]:
    """Return the kernels of both reports for NVIDIA's architectures."""
    ours, nvcc = (
        json.loads((folder / f"{name}_compile.json").read_text()) for name in ("triton", "cuda")
    )
    return [triton(row) for row in ours if "-sm_" in row["name"]] + [
        kernel for row in nvcc for kernel in cuda(row)
    ]
