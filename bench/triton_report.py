"""What the Triton kernels compile to, without a GPU: registers, spills, memory, instructions.

    python -m orthonorm.bench.triton_report [--out FILE] [--arch 90] [--kernel product_kernel]

Every kernel is compiled ahead of time for every record of its table and every architecture, with
the alignment the launcher finds for contiguous matrices whose sides are multiples of 8. AMD's is
only compiled: the package serves ROCm by its definitions. The committed report is Triton 3.9's;
3.6 compiles all of it too, where of launches of contiguous matrices only two spill more than once
(symmetric_update in tiles of 128 on sm_100, 8 times; 2026-11).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .sass import mix

ARCHES = ("80", "90", "100", "gfx942")
# bytes one block may use: CUDA guide, table of compute capabilities; AMD CDNA 3
SHARED = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}
TENSOR_CORE = r"\b(?:HMMA|HGMMA|UTCHMMA|v_mfma)"
NEWEST = {"80": r"\bHMMA", "90": r"\bHGMMA", "100": r"\bUTCHMMA", "gfx942": "v_mfma"}
WIDE = r"ld\.global\.\S*v[24]|cp\.async|(?:global|buffer)_load_dwordx[24]"
# an offset of 32 bits or less into a tensor, in Triton's intermediate code
NARROW = r"tt\.addptr .* : (?:tensor<\S+x)?!tt\.ptr<(?:bf16|f16)>>?, (?:tensor<\S+x)?i(?:8|16|32)\b"
SIZES = ("BLOCK", "LINES", "ALONG")  # constants that begin so are the shape of a tile
# arguments; all others are pointers to float32
ARGUMENTS = {
    "table": "*i64",
    "entries": "*i64",
    "count": "i32",
    "total": "i32",
    "iterations": "i32",
    "n": "i32",
    "coefficients": "*i64",
    "blocks": "i32",
}


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel, the constants of a launch, a target."""

    op: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    arch: str
    dtype: str
    tensor_cores: bool = False
    arguments: tuple[tuple[str, str], ...] = ()
    wide: bool = True  # whether its accesses must be wide ones

    @property
    def tile(self) -> int:
        """Elements of a tile of the result."""
        return int(self.constants.get("BLOCK_M", 1) * self.constants.get("BLOCK_N", 1))

    @property
    def name(self) -> str:
        blocks = "x".join(str(v) for k, v in self.constants.items() if k.startswith(SIZES))
        target = f"sm_{self.arch}" if self.arch.isdigit() else self.arch
        return f"{self.op}-{self.dtype}-{blocks}-{target}"


def module(name: str) -> Any:
    return importlib.import_module(f"orthonorm.kernels.{name}")


# a product: its table, orders of A, B, C, D and out (1: rows contiguous), if C is added, its end
PRODUCTS = {
    "gram": ("symmetric", (1, 0, 1, 1, 1), False, "store"),
    "gram-tall": ("symmetric", (0, 1, 1, 1, 1), False, "store"),
    "symmetric_update": ("symmetric", (1, 1, 1, 1, 1), True, "store"),
    "apply": ("product", (1, 1, 1, 1, 1), True, "store"),
    "apply-tall": ("product", (1, 0, 0, 1, 1), True, "store"),
    "muon": ("product", (1, 1, 1, 1, 1), False, "update"),
    "muon-tall": ("product", (1, 0, 0, 0, 0), False, "update"),
    "muon-direct": ("product", (1, 1, 1, 1, 1), True, "update"),
    "rotate": ("product", (0, 1, 1, 1, 1), False, "store"),
    "rotate_back": ("product", (1, 0, 1, 1, 1), False, "update"),
    "conda-there": ("product", (0, 1, 1, 1, 1), False, "adam"),
    "conda-there-tall": ("product", (1, 1, 1, 1, 1), False, "adam"),
    "conda-back": ("product", (1, 1, 1, 1, 1), False, "update"),
}


def products(arch: str) -> Iterator[Build]:
    """The product kernel in the orders and with the ends the package launches it in."""
    configs, ends, product, tables = map(module, ("configs", "ends", "product", "tables"))
    tensors = ("A", "B", "C", "D", "OUT")
    labels = {str(d).removeprefix("torch."): t for d, t in tables.TYPES.items()}
    for label, t in {**labels, "tf32": tables.tl.float32}.items():
        for op, (table, orders, added, name) in PRODUCTS.items():
            end = ends.End(getattr(ends, name))
            choices = configs.row(table, arch).records.get(label, ())
            for record in product.fitting(choices, *orders[2:], True, end):
                types = {f"{n}_TYPE": t for n in (*tensors, "DOT")}
                where = {f"{n}_ORDER": o for n, o in zip(tensors, orders, strict=True)}
                unused = {} if name == "update" else {"first": None, "second": None}
                constants = dict(
                    STEPS=4, **types, **where, **unused, ALIGNED=True, ADDED=added,
                    PRECISION="tf32" if label == "tf32" else "ieee",
                    SYMMETRIC=table == "symmetric", END=end.function, **record.blocks,
                )  # fmt: skip
                yield Build(
                    op, product.product_kernel, constants, record.options, arch, label,
                    label != "float32",
                )  # fmt: skip


def small(arch: str) -> Iterator[Build]:
    """Whole iterations on chip."""
    kernels, grams, tables = map(module, ("small_newton_schulz", "gram_polynomial", "tables"))
    ends = module("ends")
    for dtype in kernels.HALF:
        t, label = tables.TYPES[dtype], str(dtype).removeprefix("torch.")
        for n in (16, 32, 64):
            constants = {"TYPE": t, "BLOCK": n, "SQUARE": True}
            options = dict(num_warps=grams.warps(n), num_stages=1, **kernels.FUSION)
            yield Build(
                "small_gram_polynomial", grams.polynomial_kernel, constants, options,
                arch, label, True, (("R", "*" + t.name), ("out", "*" + t.name)), wide=False,
            )  # fmt: skip
        sides = ((16, 16), (32, 32), (64, 64), (16, 128), (64, 128), (128, 128))
        for (short, long), end in itertools.product(sides, (ends.store, ends.update)):
            constants = dict(
                STEPS=4, norms=None, **dict.fromkeys(("X_TYPE", "OUT_TYPE", "DOT_TYPE"), t),
                X_ORDER=1, OUT_ORDER=1, ALIGNED=True, SCALE=True, BLOCK_N=short, BLOCK_M=long,
                END=end, **({} if end is ends.update else {"first": None, "second": None}),
            )  # fmt: skip
            warps = kernels.warps(arch, short, long)
            options = dict(num_warps=warps, num_stages=1, **kernels.FUSION)
            op = "small_newton_schulz" if end is ends.store else "small_muon"
            yield Build(op, kernels.iterate_kernel, constants, options, arch, label, True)


FLAGS = {"grad_scale": None, "found_inf": None}  # GradScaler's
# kernel of a pass over lists: its tensors, its own arguments, its own constants
PASSES: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, str], ...], dict[str, Any]]] = {
    "rotated_adam": ("rotated_adam_kernel", ("M", "V", "X"), (), {"scales": None}),
    "decayed_update": ("decayed_update_kernel", ("W", "U"), (), {"seed": None, "found_inf": None}),
    "decayed_update_rounded": (
        "decayed_update_kernel", ("W", "U"), (("seed", "*i64"),), {"found_inf": None}
    ),
    "adamw_step": (
        "adamw_kernel", ("W", "G", "M", "V", "T"), (),
        {"seed": None, **FLAGS, "DECAY_FIRST": True, "CORRECT_EPS": True},
    ),
    "divide_each": ("divide_kernel", ("X", "OUT"), (("divisors", "*fp64"),), {}),
    "magnitude": ("squares_kernel", ("X",), (("sums", "*fp64"),), {}),
    "inner": ("products_kernel", ("X", "Y"), (("sums", "*fp64"),), {}),
    "elementwise_moment": (
        "elementwise_moment_kernel", ("V", "X"),
        (("corrections", "*fp64"), ("sums", "*fp64")), {},
    ),
    "gram_fold": ("fold_kernel", ("OUT", "X"), (), {}),
    "muon_prologue": (
        "prologue_kernel", ("G", "B", "U"), (("sums", "*fp64"),), {"NESTEROV": True, **FLAGS}
    ),
}  # fmt: skip


def passes(arch: str) -> Iterator[Build]:
    """Passes over dense, aligned tensors in bfloat16 and float32."""
    tables, each = module("tables"), module("elementwise")
    block = each.block_of(each.torch.device("cuda"))
    for op, (name, tensors, arguments, own) in PASSES.items():
        for dtype in (each.torch.bfloat16, each.torch.float32):
            types = {f"{t}_TYPE": tables.TYPES[dtype] for t in tensors}
            constants = dict(
                STEPS=7, **types, WIDE=each.tl.float32, FLAT=True, BLOCK=block, **own
            )  # fmt: skip
            kernel = getattr(module(re.sub("_fold|_rounded", "", op)), name)
            yield Build(
                op, kernel, constants, each.OPTIONS, arch,
                str(dtype).removeprefix("torch."), False, arguments,
            )  # fmt: skip


# kernel of a reduction along lines, its own constants, and whether its programs own many lines
LINES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "row_moment": ("lines", "moments_kernel", {"EPS_AT": 0, "parts": None}, False),
    "rescale": ("lines", "rescale_kernel", {"KEEP_NORM": True}, False),
    "row_normalize": ("lines", "normalize_kernel", {"EPS_AT": 0}, False),
    "factored_sums": ("lines", "moments_kernel", {"EPS_AT": 3}, True),
    "factored_norm": (
        "factored_moment", "factored_kernel", {"EPS_AT": 0, "KEEP_NORM": True, "WRITE": False}, True
    ),
    "factored_moment": (
        "factored_moment", "factored_kernel", {"EPS_AT": 0, "KEEP_NORM": True, "WRITE": True}, True
    ),
}  # fmt: skip


def reductions(arch: str) -> Iterator[Build]:
    """Reductions along rows (order 1) and columns (order 0) of bfloat16 and float32."""
    tables, lines = module("tables"), module("lines")
    names = ("factors", "sums", "row_moments", "column_moments", "parts", "moments")
    doubles = tuple((n, "*fp64") for n in names)
    for dtype in (lines.torch.bfloat16, lines.torch.float32):
        t, label = tables.TYPES[dtype], str(dtype).removeprefix("torch.")
        for op, (name, kernel, own, many) in LINES.items():
            for order in (1, 0):
                across, along = lines.blocks_of(lines.torch.device("cuda"), order, many)
                second = {"OUT_TYPE": t} if op == "row_normalize" else {"V_TYPE": t}
                constants = dict(
                    STEPS=7, X_TYPE=t, **second, WIDE=lines.tl.float32, X_ORDER=order,
                    ALIGNED=True, LINES=across, ALONG=along, **own,
                )  # fmt: skip
                yield Build(
                    op if order else op.replace("row", "column") + "_across",
                    getattr(module(name), kernel), constants,
                    lines.WIDER if many else lines.OPTIONS, arch, label, False, doubles,
                )  # fmt: skip
        yield Build(
            "factored_columns", module("factored_moment").columns_kernel,
            {"V_TYPE": t, "WIDE": lines.tl.float32}, lines.OPTIONS, arch, label, False, doubles,
            wide=False,
        )  # fmt: skip


# kernel of power iteration: its types, other constants
POWER: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "step_kernel": (("W_TYPE",), {"STEPS": 7, "ALIGNED": True, "SECOND": True}),
    "back_kernel": (("W_TYPE",), {}),
    "vectors_kernel": ((), {}),
    "start_kernel": (("U_TYPE", "V_TYPE"), {}),
    "end_kernel": (("U_TYPE", "V_TYPE"), {"MOVED": True}),
    "norms_kernel": ((), {"CHUNK": 256, "ROOT": True}),
}


def power(arch: str) -> Iterator[Build]:
    """Power iteration on rows (order 1) and columns (order 0) of W."""
    tables, kernels = module("tables"), module("power_iteration")
    doubles = tuple((n, "*fp64") for n in ("sizes", "y_squares", "z_squares", "sums", "norms"))
    device = kernels.torch.device("cuda")
    for name, (types, own) in POWER.items():
        for dtype in (kernels.torch.bfloat16, kernels.torch.float32):
            for order in (1, 0) if name == "step_kernel" else (1,):
                constants = {**dict.fromkeys(types, tables.TYPES[dtype]), **own}
                if name == "step_kernel":
                    across, along = kernels.lines.blocks_of(device, order, True)
                    constants |= {"ORDER": order, "LINES": across, "ALONG": along}
                home = kernels if hasattr(kernels, name) else module("magnitude")
                yield Build(
                    f"power-{name.removesuffix('_kernel')}{'' if order else '_across'}",
                    getattr(home, name), constants, kernels.lines.OPTIONS, arch,
                    str(dtype).removeprefix("torch."), False,
                    (*doubles, ("replaced", "*i32")), name == "step_kernel",
                )  # fmt: skip


ANYHOW = {"FLAT": False, "ALIGNED": False}  # and every order of strides 2, neither being one


def anyhow(build: Build) -> Build:
    """The same launch for tensors of any strides and alignment."""
    orders = {name: 2 for name in build.constants if name.endswith("ORDER")}
    slower = {name: value for name, value in ANYHOW.items() if name in build.constants}
    constants = build.constants | orders | slower
    return replace(build, op=f"{build.op}-anyhow", constants=constants, wide=False)


def builds(arch: str) -> Iterator[Build]:
    """Everything the package may launch on an architecture, as it is launched for tensors that are
    contiguous and aligned, and in bfloat16 for any others."""
    for family in (products, small, passes, reductions, power):
        for build in family(arch):
            yield build
            once = build.op not in ("gram-tall", "apply-tall") and not build.op.endswith("_across")
            once = once and (build.op.startswith("small") or build.tile <= 64 * 64)
            if once and build.dtype == "bfloat16" and (ANYHOW.keys() & build.constants.keys()):
                yield anyhow(build)


def compiled(build: Build) -> dict[str, Any]:
    """Compile ahead of time; what the binary needs."""
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
    """Registers and stack of a binary, and its tensor-core instructions."""
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
    """The same of AMD's assembly, which says it itself."""
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
    parser = argparse.ArgumentParser(prog="triton_report", description=__doc__)
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
