"""Figures of the compiled GPU kernels, and the least times that these imply, without a GPU.

Registers, spills, shared memory and instructions are the compilers' own, from the committed reports
(compiled.py; `--compile` renews Triton's, `make cuda` nvcc's). Occupancy, waves and tile efficiency
follow from them and from the shapes of a case. A floor time is the least that the rates of the
datasheet allow for work cut into these tiles. None of this is a measurement.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from orthonorm.kernels.configs import SMALLER
from torch import Tensor

from . import candidates, report, sass, shapes, triton_report
from .cases import CASES
from .compiled import DEVICES, FOLDER, LINES, Device, Kernel, kernels, triton_name
from .inputs import DTYPES, Inputs
from .makers import KELLER
from .options import matches
from .records import Run


class Launch(NamedTuple):
    """A case on a device.

    `tiles` is the number of programs, `useful` the operations asked for, `done` those of whole
    tiles, and `traffic` the least bytes moved.
    """

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
    def busiest(self) -> float:
        """Operations of the multiprocessor that does most."""
        return math.ceil(self.tiles / self.device.processors) * self.done / self.tiles

    @property
    def floor(self) -> float:
        """Least seconds: the busiest multiprocessor at its share of the peak, or the traffic."""
        d = self.device
        peak = d.rate(self.kernel.dtype) / d.processors
        return max(self.busiest / peak, self.traffic / d.memory)


def _symmetric(shape: Sequence[int], k: int, kernel: Kernel) -> tuple[int, float, float]:
    """Return (tiles, useful, done) of one triangle of an n x n product of inner size k."""
    batch, n, block = math.prod(shape[:-2]), shape[-2], kernel.blocks[0]
    side = math.ceil(n / block)
    tiles = batch * side * (side + 1) // 2
    return tiles, batch * n * (n + 1.0) * k, tiles * 2.0 * block * block * k


def _product(shape: Sequence[int], kernel: Kernel) -> tuple[int, float, float]:
    """Return (tiles, useful, done) of an n x n matrix times an n x m one."""
    batch, n, m = math.prod(shape[:-2]), shape[-2], shape[-1]
    rows, columns = kernel.blocks[:2]
    tiles = batch * math.ceil(n / rows) * math.ceil(m / columns)
    return tiles, batch * 2.0 * n * n * m, tiles * 2.0 * rows * columns * n


def _small(shape: Sequence[int], kernel: Kernel) -> tuple[int, float, float]:
    """Return (programs, useful, done) of whole iterations on chip, one matrix per program."""
    batch, (n, m) = math.prod(shape[:-2]), sorted(shape[-2:])
    short, long = kernel.blocks
    steps = len(KELLER) / 3
    return (batch, batch * steps * (4.0 * n * n * m + 2.0 * n**3),
            batch * steps * (4.0 * short * short * long + 2.0 * short**3))  # fmt: skip


def tiling(shape: Sequence[int], kernel: Kernel) -> tuple[int, float, float]:
    """Return (programs, FLOPs asked for, FLOPs of whole tiles); 0 FLOPs if only memory counts."""
    if kernel.op == "gram":
        return _symmetric(shape, shape[-1], kernel)
    if kernel.op == "symmetric_update":
        n = min(shape[-2:])
        return _symmetric((*shape[:-2], n, n), n, kernel)
    if kernel.op == "apply":
        return _product(shape, kernel)
    if kernel.op == "small_newton_schulz":
        return _small(shape, kernel)
    if kernel.op in LINES and (kernel.language == "Triton" or kernel.op == "power-step"):
        lines = shape[-1] if kernel.op.endswith("_across") else shape[-2]
        return math.prod(shape[:-2]) * math.ceil(lines / kernel.blocks[0]), 0.0, 0.0
    per_tile = math.prod(kernel.blocks)
    return math.ceil(math.prod(shape) / per_tile), 0.0, 0.0


def fits(kernel: Kernel, shape: Sequence[int]) -> bool:
    """True unless the kernel iterates on chip in blocks other than the smallest for the matrix."""
    if kernel.op != "small_newton_schulz":
        return True
    n, m = (max(16, 1 << (side - 1).bit_length()) for side in sorted(shape[-2:]))
    return kernel.blocks == (n, m)


@functools.lru_cache
def _traffic(name: str, shape: str, dtype: str) -> float:
    """Return the least bytes that a case moves, from arguments on the meta device."""
    inputs = _Shapes(DTYPES[dtype], device="meta")
    return candidates.bytes_moved(CASES[name], CASES[name].calls(shapes.parse(shape), inputs))


class _Shapes(Inputs):
    """Inputs with shapes and dtypes but no numbers."""

    def normal(self, tag: str, shape: shapes.Shape) -> Tensor:
        return torch.empty(shape, device="meta")


def launches(found: Iterable[Kernel], name: str, shape: str) -> Iterator[Launch]:
    """Yield the launch of a case for every device, dtype and language.

    Chooses among a kernel's records as `configs.pick` does: the largest tiles, or smaller ones if
    these give the busiest multiprocessor less than SMALLER times the work.
    """
    workload = shapes.parse(shape)
    op = triton_name(name)
    if not CASES[name].takes_list:
        shape = shapes.describe(workload.shapes[:1])  # the first of several calls
        workload = shapes.parse(shape)
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for k in found:
        if k.op == op and k.blocks and all(fits(k, s) for s in workload.shapes):
            groups.setdefault((k.arch, k.dtype, k.language), []).append(k)
    for (_, dtype, _), choices in groups.items():
        made = []
        for k in choices:
            counts = [tiling(s, k) for s in workload.shapes]
            tiles, useful, done = (sum(column) for column in zip(*counts, strict=True))
            made.append(Launch(name, shape, k, int(tiles), useful, done,
                               _traffic(name, shape, dtype)))  # fmt: skip
        best = made[0]
        for smaller in made[1:]:
            if smaller.busiest < SMALLER * best.busiest:
                best = smaller
        yield best


HEAD = ("op", "shape", "by", "GPU", "tile", "dtype", "regs", "spills", "KiB", "warps", "occup.",
        "waves", "tile eff.", "floor us")  # fmt: skip


def cells(x: Launch) -> tuple[str, ...]:
    """Return the table's cells of a launch."""
    k = x.kernel
    return (
        x.case, x.shape, k.language, "sm_" + k.arch, "x".join(map(str, k.blocks)), k.dtype,
        str(k.registers), str(k.spills), f"{k.shared / 1024:.0f}", str(k.warps),
        f"{k.occupancy(x.device):.0%}", f"{x.waves:.2f}", f"{x.efficiency:.0%}",
        f"{1e6 * x.floor:.1f}",
    )  # fmt: skip


def mixes(found: Iterable[Kernel]) -> list[str]:
    """Return a line per kernel with the shares of its instructions by class."""
    names = [name for name, _ in sass.CLASSES] + ["other"]
    rows = [("kernel", "instructions", *names)]
    for k in found:
        total = sum(k.mix.values())
        if total:
            shares = (f"{k.mix.get(name, 0) / total:.0%}" for name in names)
            rows.append((k.name, str(total), *shares))
    return report.align(rows) if len(rows) > 1 else []


def main(options: argparse.Namespace, run: Run) -> None:
    """Print every case that a compiled kernel serves and that --shape, --dtype and -k select.

    --compile first renews Triton's report.
    """
    path = FOLDER / "triton_compile.json"
    if options.compile:
        print("compiling (about five minutes)", flush=True)
        triton_report.main(["--out", str(path)])
    found = kernels()
    wanted = [k for k in found if k.dtype in (options.dtype or ("bfloat16", "float32"))]
    lines: list[tuple[str, ...]] = []
    used: dict[str, Kernel] = {}
    for name, case in CASES.items():
        for shape in options.shape or case.shapes:
            for x in launches(wanted, name, shape):
                row = cells(x)
                if options.filter is None or matches(options.filter, "-".join(row)):
                    lines.append(row)
                    used[x.kernel.name] = x.kernel
    if not lines:
        raise ValueError("bench: no compiled kernel matches; see bench static without -k")
    print("Not measured: compiled ahead of time; floors by datasheet rates of")
    for arch, d in DEVICES.items():
        rates = f"{d.half / 1e12:g} TFLOP/s half, {d.single / 1e12:g} float32"
        print(f"  sm_{arch}  {d.name}: {d.processors} SMs, {rates}, {d.memory / 1e12:g} TB/s")
    print("", *report.align([HEAD, *lines], left=6), "", sep="\n")
    print("\n".join(mixes(used.values())))
