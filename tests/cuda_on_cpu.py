"""The CUDA kernels built for the CPU: `csrc/cuda/*.cu` by a C++ compiler, with the emulation in
`csrc/tests/cuda_on_cpu`, as a library that claims the CPU keys."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda_on_cpu"
TORCH = Path(torch.__file__).parent
FLAGS = (
    "-x c++ -std=c++20 -O1 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off "
    "-Wall -Wno-unknown-pragmas -Wno-attributes"
)


def library() -> Path:
    """Built by ninja where sources, headers or torch changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    include = f"-I{ROOT}/csrc -I{ROOT}/csrc/tests/cuda_on_cpu -isystem {TORCH}/include"
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = [f"{source.stem}.o" for source in sources]
    compiler = os.environ.get("CXX", "g++")
    lines = [
        "rule compile",
        f"  command = {compiler} {FLAGS} {include} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{TORCH}/lib -ltorch -ltorch_cpu -lc10",
        *(f"build {o}: compile {s}" for o, s in zip(objects, sources, strict=True)),
        f"build orthonorm_cuda_on_cpu.so: link {' '.join(objects)}",
        "",
    ]
    (BUILD / "build.ninja").write_text("\n".join(lines))
    import ninja

    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", "2", "-C", str(BUILD)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr
    return BUILD / "orthonorm_cuda_on_cpu.so"
