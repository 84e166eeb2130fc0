"""What the GPU kernels compile to, and what that implies, on a machine without a GPU.

Registers, spills, shared memory and instructions are the compiler's, from the committed reports
(`bench/results/*_compile.json`; `--compile` makes Triton's anew). Occupancy, waves and tile
efficiency follow from them and from a case's shapes; a floor time is what the datasheet's rates
allow work cut into those tiles. None of it is a measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import candidates, report, sass, shapes, triton_report
from .cases import CASES
from .inputs import DTYPES, Inputs
from .makers import KELLER
from .options import matches
from .records import Run

FOLDER = Path(__file__).parent / "results"
WARP = 32


class Device(NamedTuple):
    """A datasheet: multiprocessors, dense FLOP/s by dtype, bytes per second; and what a
    multiprocessor holds (CUDA C++ programming guide, table of compute capabilities)."""

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
    """A compiled kernel as the reports have it."""

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
        """Blocks a multiprocessor holds: registers come in units of 256 a warp, shared memory
        with 1 KiB of the system's a block from sm_80 on."""
        per_warp = 256 * math.ceil(max(self.registers, 1) * WARP / 256)
        return min(
            device.blocks,
            device.threads // (WARP * self.warps),
            device.registers // (per_warp * self.warps),
            device.shared // (self.shared + 1024),
        )

    def occupancy(self, device: Device) -> float:
        return self.resident(device) * self.warps * WARP / device.threads


def kernel(row: dict[str, Any]) -> Kernel:
    """A row of Triton's report, named op-dtype-blocks-sm_arch."""
    head, _, arch = row["name"].rpartition("-sm_")
    op, dtype, blocks = head.rsplit("-", 2)
    sizes = tuple(int(b) for b in blocks.split("x")) if blocks else ()
    return Kernel(row["name"], op, arch, dtype, sizes, row["warps"], row["registers"],
                  row["shared"], row["spills"], row["mix"])  # fmt: skip


def kernels(folder: Path = FOLDER) -> list[Kernel]:
    rows = json.loads((folder / "triton_compile.json").read_text())
    return [kernel(row) for row in rows if "-sm_" in row["name"]]


class Launch(NamedTuple):
    """A case on a device: programs, floating-point operations asked for and done on whole tiles,
    bytes moved at least."""

    case: str
    shape: str
    kernel: Kernel
    tiles: int
    useful: float
    done: float
    traffic: float

    @property
    def device(self) -> Device:
        return DEVICES[self.kernel.arch]

    @property
    def waves(self) -> float:
        return self.tiles / (self.device.processors * max(1, self.kernel.resident(self.device)))

    @property
    def efficiency(self) -> float:
        return self.useful / self.done if self.done else 1.0

    @property
    def floor(self) -> float:
        """Seconds: the busiest multiprocessor's tiles at its share of the peak, or the traffic."""
        d = self.device
        most = math.ceil(self.tiles / d.processors)
        peak = d.rate(self.kernel.dtype) / d.processors
        return max(most * self.done / self.tiles / peak, self.traffic / d.memory)


def _symmetric(shape: Sequence[int], k: int, kernel: Kernel) -> tuple[int, float, float]:
    """(tiles, useful, done) of an n x n product of inner size k, one triangle of tiles."""
    batch, n, block = math.prod(shape[:-2]), shape[-2], kernel.blocks[0]
    rows = math.ceil(n / block)
    tiles = batch * rows * (rows + 1) // 2
    return tiles, batch * n * (n + 1.0) * k, tiles * 2.0 * block * block * k


def _product(shape: Sequence[int], kernel: Kernel) -> tuple[int, float, float]:
    batch, n, m = math.prod(shape[:-2]), shape[-2], shape[-1]
    rows, columns = kernel.blocks[:2]
    tiles = batch * math.ceil(n / rows) * math.ceil(m / columns)
    return tiles, batch * 2.0 * n * n * m, tiles * 2.0 * rows * columns * n


def _small(shape: Sequence[int], kernel: Kernel) -> tuple[int, float, float]:
    batch, (n, m) = math.prod(shape[:-2]), sorted(shape[-2:])
    short, long = kernel.blocks
    steps = len(KELLER) / 3
    return (batch, batch * steps * (4.0 * n * n * m + 2.0 * n**3),
            batch * steps * (4.0 * short * short * long + 2.0 * short**3))  # fmt: skip


# kernels of ops that go by another name in the reports
KERNELS = {
    "power_iteration_": "power-step",
    "column_moment_": "column_moment_across",
    "column_normalize": "column_normalize_across",
}


def tiling(shape: Sequence[int], kernel: Kernel) -> tuple[int, float, float]:
    """Programs of a launch, FLOPs asked for, FLOPs of whole tiles (0: memory alone counts)."""
    if kernel.op == "gram":
        return _symmetric(shape, shape[-1], kernel)
    if kernel.op == "symmetric_update":
        n = min(shape[-2:])
        return _symmetric((*shape[:-2], n, n), n, kernel)
    if kernel.op == "apply":
        return _product(shape, kernel)
    if kernel.op == "small_newton_schulz":
        return _small(shape, kernel)
    per_tile = math.prod(kernel.blocks)
    return math.ceil(math.prod(shape) / per_tile), 0.0, 0.0


def fits(kernel: Kernel, shape: Sequence[int]) -> bool:
    """Whether a whole-iteration kernel's blocks hold the matrix, and no smaller one's would."""
    if kernel.op != "small_newton_schulz":
        return True
    n, m = (max(16, 1 << (side - 1).bit_length()) for side in sorted(shape[-2:]))
    return kernel.blocks == (n, m)


@functools.lru_cache
def _traffic(name: str, shape: str, dtype: str) -> float:
    """Least bytes of the case's arguments, which are never filled."""
    inputs = _Shapes(DTYPES[dtype], device="meta")
    return candidates.bytes_moved(CASES[name], CASES[name].calls(shapes.parse(shape), inputs))


class _Shapes(Inputs):
    """Inputs of which only shapes and dtypes matter."""

    def normal(self, tag: str, shape: shapes.Shape) -> Tensor:
        return torch.empty(shape, device="meta")


def launches(found: Iterable[Kernel], name: str, shape: str) -> Iterator[Launch]:
    """The launch of a case on every device: as `kernels/configs.py` picks, the first record whose
    tiles fill the device, else the one with most tiles."""
    workload = shapes.parse(shape)
    op = KERNELS.get(name, name.rstrip("_"))
    if not CASES[name].takes_list:
        shape = shapes.describe(workload.shapes[:1])  # one call of several
        workload = shapes.parse(shape)
    by_device: dict[tuple[str, str], list[Kernel]] = {}
    for k in found:
        if k.op == op and k.blocks and all(fits(k, s) for s in workload.shapes):
            by_device.setdefault((k.arch, k.dtype), []).append(k)
    for (arch, dtype), choices in by_device.items():
        made = []
        for k in choices:
            parts = [tiling(s, k) for s in workload.shapes]
            tiles, useful, done = (sum(column) for column in zip(*parts, strict=True))
            made.append(Launch(name, shape, k, int(tiles), useful, done,
                               _traffic(name, shape, dtype)))  # fmt: skip
        filling = (m for m in made if m.tiles >= DEVICES[arch].processors)
        yield next(filling, max(made, key=lambda m: m.tiles))


HEAD = ("op", "shape", "GPU", "tile", "dtype", "regs", "spills", "KiB", "warps", "occup.", "waves",
        "tile eff.", "floor us")  # fmt: skip


def cells(x: Launch) -> tuple[str, ...]:
    k = x.kernel
    return (
        x.case, x.shape, "sm_" + k.arch, "x".join(map(str, k.blocks)), k.dtype, str(k.registers),
        str(k.spills), f"{k.shared / 1024:.0f}", str(k.warps), f"{k.occupancy(x.device):.0%}",
        f"{x.waves:.2f}", f"{x.efficiency:.0%}", f"{1e6 * x.floor:.1f}",
    )  # fmt: skip


def mixes(found: Iterable[Kernel]) -> list[str]:
    """A line per kernel: its instructions by class, in percent."""
    names = [name for name, _ in sass.CLASSES] + ["other"]
    rows = [("kernel", "instructions", *names)]
    for k in found:
        total = sum(k.mix.values())
        if total:
            shares = (f"{k.mix.get(name, 0) / total:.0%}" for name in names)
            rows.append((k.name, str(total), *shares))
    return report.align(rows) if len(rows) > 1 else []


def main(options: argparse.Namespace, run: Run) -> None:
    """Print every case of the table that a compiled kernel serves, as --shape, --dtype and -k
    leave them; --compile writes Triton's report anew first."""
    path = FOLDER / "triton_compile.json"
    if options.compile:
        print("compiling (about two minutes)", flush=True)
        triton_report.main(["--out", str(path)])
    found = kernels()
    wanted = [k for k in found if k.dtype in (options.dtype or ("bfloat16", "float32"))]
    lines, used = [], []
    for name, case in CASES.items():
        for shape in options.shape or case.shapes:
            for x in launches(wanted, name, shape):
                row = cells(x)
                if options.filter is None or matches(options.filter, "-".join(row)):
                    lines.append(row)
                    used.append(x.kernel)
    if not lines:
        raise ValueError("bench: no compiled kernel matches; see bench static without -k")
    print("Not measured: compiled ahead of time; floors by datasheet rates of")
    for arch, d in DEVICES.items():
        rates = f"{d.half / 1e12:g} TFLOP/s half, {d.single / 1e12:g} float32"
        print(f"  sm_{arch}  {d.name}: {d.processors} SMs, {rates}, {d.memory / 1e12:g} TB/s")
    print("", *report.align([HEAD, *lines], left=5), "", sep="\n")
    print("\n".join(mixes(dict.fromkeys(used))))
