"""Compile report of the Triton kernels, without a GPU: registers, spills, memory, instructions.

    python -m orthonorm.bench.triton_report [--out FILE] [--arch 90] [--kernel symmetric_update]

Compiles every kernel ahead of time, for every record of its table and every architecture, with the
alignment that the launcher finds for contiguous matrices with sides that are multiples of 8. For
AMD the kernels are only compiled; the package serves ROCm by its definitions. The committed report
is from Triton 3.9. Triton 3.6 compiles all of it too; there, of launches on contiguous matrices,
only some of sm_100 in tiles of 128 spill more than once: first_factor 52 times, gram_chain 26,
symmetric_update 8 (2026-11).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .sass import mix
from .triton_builds import ARCHES, Build, builds

# bytes of shared memory per block: CUDA guide, table of compute capabilities; AMD CDNA 3
SHARED = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}
TENSOR_CORE = r"\b(?:HMMA|HGMMA|UTCHMMA|v_mfma)"
NEWEST = {"80": r"\bHMMA", "90": r"\bHGMMA", "100": r"\bUTCHMMA", "gfx942": "v_mfma"}
WIDE = r"ld\.global\.\S*v[24]|cp\.async|(?:global|buffer)_load_dwordx[24]"
# an offset of at most 32 bits into a half-precision tensor, in Triton's intermediate code
NARROW = r"tt\.addptr .* : (?:tensor<\S+x)?!tt\.ptr<(?:bf16|f16)>>?, (?:tensor<\S+x)?i(?:8|16|32)\b"
# types of arguments; all others are pointers to float32
ARGUMENTS = {
    "table": "*i64",
    "entries": "*i64",
    "count": "i32",
    "total": "i32",
    "iterations": "i32",
    "steps": "i32",
    "n": "i32",
    "coefficients": "*i64",
    "blocks": "i32",
}


def compiled(build: Build) -> dict[str, Any]:
    """Compile a build ahead of time; return its row of the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [p.name for p in build.kernel.params]
    given = ARGUMENTS | dict(build.arguments)
    signature = {n: "constexpr" if n in build.constants else given.get(n, "*fp32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    source = ASTSource(
        fn=build.kernel, signature=signature, attrs=attributes,
        constexprs={(names.index(n),): v for n, v in build.constants.items()},
    )  # fmt: skip
    nvidia = build.arch.isdigit()
    target = GPUTarget("cuda", int(build.arch), 32) if nvidia else GPUTarget("hip", build.arch, 64)
    kernel = triton.compile(source, target=target, options=dict(build.options))
    found = kernel.asm
    own = measured(found["cubin"], build.arch) if nvidia else measured_amd(found["amdgcn"])
    return {
        "name": build.name,
        "triton": triton.__version__,
        "tensor_cores": build.tensor_cores,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        **own,
        "vectorized": bool(re.search(WIDE, found["ptx" if nvidia else "amdgcn"])),
        "narrow_offsets": len(re.findall(NARROW, found["ttir"])),
    }


def measured(cubin: bytes, arch: str) -> dict[str, Any]:
    """Return registers, stack, spills and counts of instructions of an NVIDIA binary."""
    import triton.backends.nvidia as backend

    tools = Path(backend.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", path)
        code = _run(tools / "nvdisasm", "-c", path)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1])
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "tensor_core_instructions": len(re.findall(TENSOR_CORE, code)),
        "newest_instructions": len(re.findall(NEWEST[arch], code)),
        "mix": mix(code),
    }


def measured_amd(code: str) -> dict[str, Any]:
    """Return the same figures of AMD's assembly, which states them."""
    registers, spills, stack = (
        int(re.findall(rf"\.{name}:\s*(\d+)", code)[-1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    instructions = len(re.findall(TENSOR_CORE, code))
    return {
        "registers": registers,
        "stack": stack,
        "spills": spills,
        "tensor_core_instructions": instructions,
        "newest_instructions": instructions,
        "mix": {},
    }


def _run(*command: Any) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True
    ).stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m orthonorm.bench.triton_report", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="write JSON here instead of to the terminal")
    parser.add_argument("--arch", choices=ARCHES, action="append")
    parser.add_argument("--kernel", default="", help="only ops whose name contains this")
    options = parser.parse_args(arguments)
    rows = [
        compiled(b) for a in options.arch or ARCHES for b in builds(a) if options.kernel in b.op
    ]
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
