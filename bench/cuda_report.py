"""Compile report of the CUDA kernels: registers, stack, shared memory and instructions.

    cmake -S . -B build/cuda -DWITH_CUDA=ON -DBUILD_TESTING=OFF && cmake --build build/cuda -j 2
    python -m orthonorm.bench.cuda_report [--out bench/results/cuda_compile.json]

Reads the object files, so it needs nvcc but no GPU. A stack of 0 bytes means that nothing spilled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import sass

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "cuda" / "CMakeFiles" / "_C_cuda.dir" / "csrc" / "cuda"
RESULTS = Path(__file__).resolve().parent / "results" / "cuda_compile.json"
ARCHES = ("sm_80", "sm_90", "sm_100")
INSTRUCTIONS = {  # instructions that are counted in the machine code of a kernel
    "loads_16": r"\bLDG\.E\.(?:\w+\.)*128",
    "stores_16": r"\bSTG\.E\.(?:\w+\.)*128",
    "bulk_copies": r"\b(?:UBLKCP|UTMALDG)",
    "async_copies": r"\bLDGSTS",
    "tensor_cores": r"\b(?:HMMA|HGMMA|UTCHMMA)",
    "generic_16": r"\bLD\.E\.(?:\w+\.)*128",  # such as loads from other blocks of a cluster
    "cluster_barriers": r"\bUCGABAR_WAIT",
}


def sources() -> list[Path]:
    """Return the CUDA source files."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def built() -> bool:
    """True if every source has an object that is newer than all its inputs (by CMake's list)."""
    for source in sources():
        made = OBJECTS / f"{source.name}.o"
        listed = made.with_name(f"{made.name}.d")
        if not made.exists() or not listed.exists():
            return False
        names = [name for name in listed.read_text().split() if str(ROOT / "csrc") in name]
        if not names or any(Path(n).stat().st_mtime > made.stat().st_mtime for n in names):
            return False
    return bool(sources())


def tool(*arguments: str) -> str:
    """Run cuobjdump and return its output; Triton's wheel contains it, and nvdisasm."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {run.stderr or run.stdout}")
    return run.stdout


def plain(symbols: list[str]) -> dict[str, str]:
    """Return readable kernel names by symbol, such as "elementwise_kernel<MagnitudeOp, float>"."""
    run = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = {}
    for symbol, name in zip(symbols, run.stdout.splitlines(), strict=True):
        short = re.sub(r"^void |orthonorm::(?:cuda::)?", "", name)
        short = re.sub(r"\((\w+)\)(\d+)", r"\1 \2", short)  # value of an enumeration
        names[symbol] = short.partition("(")[0]
    return names


def by_arch(text: str) -> dict[str, str]:
    """Split cuobjdump's output of an object by architecture."""
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(source: Path) -> list[dict[str, Any]]:
    """Return a row for every kernel of a source, for every architecture."""
    path = str(OBJECTS / f"{source.name}.o")
    usage, code = (by_arch(tool(option, path)) for option in ("-res-usage", "-sass"))
    found = []
    for arch in ARCHES:
        bodies = re.split(r"^\s*Function : (\S+)$", code[arch], flags=re.M)[1:]
        bodies_of = dict(zip(bodies[::2], bodies[1::2], strict=True))
        pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
        used = re.findall(pattern, usage[arch])
        names = plain([symbol for symbol, *_ in used])
        for symbol, registers, stack, shared in used:
            counts = {
                name: len(re.findall(instruction, bodies_of[symbol]))
                for name, instruction in INSTRUCTIONS.items()
            }
            found.append(
                {
                    "op": source.stem,
                    "kernel": names[symbol],
                    "arch": arch,
                    "registers": int(registers),
                    "stack": int(stack),
                    "shared": int(shared),
                    **counts,
                    "mix": sass.mix(bodies_of[symbol]),
                }
            )
    return sorted(found, key=lambda row: (row["op"], row["kernel"], ARCHES.index(row["arch"])))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m orthonorm.bench.cuda_report")
    parser.add_argument("--out", type=Path, help="write the table there")
    arguments = parser.parse_args()
    if not built():
        print(f"no objects of these sources in {OBJECTS}; build them first", file=sys.stderr)
        return 1
    table = [row for source in sources() for row in rows(source)]
    lines = ",\n".join(json.dumps(row) for row in table)
    if arguments.out:
        arguments.out.write_text(f"[\n{lines}\n]\n")
    for row in table:
        print(" ".join(f"{value}" for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
