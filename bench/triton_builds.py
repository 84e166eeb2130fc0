"""All launches of Triton kernels that the package may make, for `triton_report` to compile."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

ARCHES = ("80", "90", "100", "gfx942")
SIZES = ("BLOCK", "LINES", "ALONG")  # prefixes of the constants that give a tile's shape


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel, the constants of a launch, and a target."""

    op: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    arch: str
    dtype: str
    tensor_cores: bool = False
    arguments: tuple[tuple[str, str], ...] = ()
    wide: bool = True  # True if its memory accesses must be wide

    @property
    def tile(self) -> int:
        """Number of elements in a tile of the result."""
        return int(self.constants.get("BLOCK_M", 1) * self.constants.get("BLOCK_N", 1))

    @property
    def name(self) -> str:
        blocks = "x".join(str(v) for k, v in self.constants.items() if k.startswith(SIZES))
        target = f"sm_{self.arch}" if self.arch.isdigit() else self.arch
        return f"{self.op}-{self.dtype}-{blocks}-{target}"


def module(name: str) -> Any:
    """Import a module of orthonorm.kernels."""
    return importlib.import_module(f"orthonorm.kernels.{name}")


# by end (what becomes of a tile): its function, and the types of the two tensors it may read
READS: dict[str, tuple[str, str | None, str | None]] = {
    "store": ("store", None, None),
    "adam": ("adam", None, None),
    "update": ("update", "*fp32", None),
    "scaled_update": ("update", "*fp32", "*fp32"),
    "rounded_update": ("update", "*fp32", "*i64"),
    "row_squares": ("row_squares", "*fp32", None),
    "column_squares": ("column_squares", "*fp32", None),
}


def end_of(name: str) -> tuple[Any, dict[str, None], tuple[tuple[str, str], ...]]:
    """Return an end, its missing tensors as constants, and the types of those that it reads."""
    ends = module("ends")
    function, *types = READS[name]
    given = dict(zip(("first", "second"), types, strict=True))
    second = ends.torch.empty(0, dtype=ends.torch.int64) if types[1] == "*i64" else None
    return (
        ends.End(getattr(ends, function), second=second),
        {n: t for n, t in given.items() if t is None},
        tuple((n, t) for n, t in given.items() if t is not None),
    )


# by product: its table of records, the orders of A, B, C, D and out (1: rows are contiguous), how
# many of C and D it adds, and its end
PRODUCTS = {
    "gram": ("symmetric", (1, 0, 1, 1, 1), 0, "store"),
    "gram-tall": ("symmetric", (0, 1, 1, 1, 1), 0, "store"),
    "first_factor": ("symmetric", (1, 1, 1, 1, 1), 2, "store"),
    "symmetric_update": ("symmetric", (1, 1, 1, 1, 1), 1, "store"),
    "apply": ("product", (1, 1, 1, 1, 1), 1, "store"),
    "apply-tall": ("product", (1, 0, 0, 1, 1), 1, "store"),
    "muon": ("product", (1, 1, 1, 1, 1), 0, "update"),
    "muon-tall": ("product", (1, 0, 0, 0, 0), 0, "update"),
    "muon-direct": ("product", (1, 1, 1, 1, 1), 1, "update"),
    "muon-rounded": ("product", (1, 1, 1, 1, 1), 0, "rounded_update"),
    "normuon": ("product", (1, 1, 1, 1, 1), 0, "row_squares"),
    "normuon-tall": ("product", (1, 0, 0, 0, 0), 0, "column_squares"),
    "rotate": ("product", (0, 1, 1, 1, 1), 0, "store"),
    "rotate_back": ("product", (1, 0, 1, 1, 1), 0, "update"),
    "conda-there": ("product", (0, 1, 1, 1, 1), 0, "adam"),
    "conda-there-tall": ("product", (1, 1, 1, 1, 1), 0, "adam"),
    "conda-back": ("product", (1, 1, 1, 1, 1), 0, "scaled_update"),
}


def products(arch: str) -> Iterator[Build]:
    """Yield the product kernel in all orders and with all ends that the package uses."""
    configs, product, tables = map(module, ("configs", "product", "tables"))
    tensors = ("A", "B", "C", "D", "OUT")
    labels = {str(d).removeprefix("torch."): t for d, t in tables.TYPES.items()}
    for label, t in {**labels, "tf32": tables.tl.float32}.items():
        for op, (table, orders, added, name) in PRODUCTS.items():
            end, unused, given = end_of(name)
            choices = configs.row(table, arch).records.get(label, ())
            for record in product.fitting(choices, *orders[2:], True, end.function, end.rounds):
                types = {f"{n}_TYPE": t for n in (*tensors, "DOT")}
                where = {f"{n}_ORDER": o for n, o in zip(tensors, orders, strict=True)}
                constants = dict(
                    STEPS=4, **types, **where, **unused, ALIGNED=True, ADDED=added,
                    PRECISION="tf32" if label == "tf32" else "ieee",
                    SYMMETRIC=table == "symmetric", END=end.function, **record.blocks,
                )  # fmt: skip
                yield Build(
                    op, product.product_kernel, constants, record.options, arch, label,
                    label != "float32", given,
                )  # fmt: skip


# kernels of whole iterations on chip, and their ends
SMALL = {
    "small_newton_schulz": "store", "small_muon": "update", "small_muon-rounded": "rounded_update",
    "small_normuon": "row_squares", "small_normuon-tall": "column_squares",
}  # fmt: skip


def small(arch: str) -> Iterator[Build]:
    """Yield the kernels of whole iterations on chip."""
    kernels, grams, tables = map(module, ("small_newton_schulz", "gram_polynomial", "tables"))
    configs = module("configs")
    for dtype in kernels.HALF:
        t, label = tables.TYPES[dtype], str(dtype).removeprefix("torch.")
        for n in (16, 32, 64):
            constants = {"TYPE": t, "BLOCK": n, "SQUARE": True}
            options = dict(num_warps=grams.warps(n), num_stages=1, **kernels.FUSION)
            yield Build(
                "small_gram_polynomial", grams.polynomial_kernel, constants, options,
                arch, label, True, (("R", "*" + t.name), ("out", "*" + t.name)), wide=False,
            )  # fmt: skip
        for record in configs.records("chain", dtype, arch):
            constants = {"TYPE": t, "BLOCK_M": record.block_m, "BLOCK_K": record.block_k}
            yield Build(
                "gram_chain", grams.chain_kernel, constants, record.options, arch, label, True
            )
        sides = ((16, 16), (32, 32), (64, 64), (16, 128), (64, 128), (128, 128))
        for (short, long), (op, end) in itertools.product(sides, SMALL.items()):
            if end not in ("store", "update") and short * long < 64 * 128:
                continue  # these take no more registers than the builds that are kept
            ending, unused, given = end_of(end)
            constants = dict(
                STEPS=4, norms=None, **dict.fromkeys(("X_TYPE", "OUT_TYPE", "DOT_TYPE"), t),
                X_ORDER=1, OUT_ORDER=1, ALIGNED=True, SCALE=True, BLOCK_N=short, BLOCK_M=long,
                END=ending.function, **unused,
            )  # fmt: skip
            warps = kernels.warps(arch, short, long)
            options = dict(num_warps=warps, num_stages=1, **kernels.FUSION)
            yield Build(op, kernels.iterate_kernel, constants, options, arch, label, True, given)


FLAGS = {"grad_scale": None, "found_inf": None}  # arguments of GradScaler
# by pass over lists: its kernel, its tensors, further arguments, further constants
PASSES: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, str], ...], dict[str, Any]]] = {
    "rotated_adam": ("rotated_adam_kernel", ("M", "V", "X"), (), {"scales": None}),
    "decayed_update": ("decayed_update_kernel", ("W", "U"), (), {"seed": None, "found_inf": None}),
    "decayed_update_rounded": (
        "decayed_update_kernel", ("W", "U"), (("seed", "*i64"),), {"found_inf": None}
    ),
    "adamw_step": (
        "adamw_kernel", ("W", "G", "M", "V", "T"), (),
        {"seed": None, **FLAGS, "R_TYPE": None, "DECAY_FIRST": True, "CORRECT_EPS": True},
    ),
    "adamw_step_halves": (
        "adamw_kernel", ("W", "G", "M", "V", "R", "T"), (),
        {"seed": None, **FLAGS, "DECAY_FIRST": True, "CORRECT_EPS": True},
    ),
    "coded_adamw_step": (
        "coded_adamw_kernel", ("W", "G", "M_CODES", "V_CODES", "M_SCALES", "V_SCALES", "T"),
        (("m_intervals", "*i32"), ("v_intervals", "*i32")),
        {"seed": None, **FLAGS, "DECAY_FIRST": True, "CORRECT_EPS": True},
    ),
    "divide_each": ("divide_kernel", ("X", "OUT"), (("divisors", "*fp64"),), {}),
    "magnitude": ("squares_kernel", ("X",), (("sums", "*fp64"),), {}),
    "magnitude_peaks": ("peaks_kernel", ("X",), (("peaks", "*i32"),), {}),
    "inner": ("products_kernel", ("X", "Y"), (("sums", "*fp64"),), {}),
    "elementwise_moment": (
        "elementwise_moment_kernel", ("V", "X"),
        (("corrections", "*fp64"), ("sums", "*fp64")), {},
    ),
    "sign": ("sign_kernel", ("X",), (), {}),
    "quantize_blocks": (
        "quantize_kernel", ("X", "CODES", "SCALES"), (("intervals", "*i32"),), {"SIGNED": False}
    ),
    "dequantize_blocks": ("dequantize_kernel", ("X", "CODES", "SCALES"), (), {}),
    "gram_fold": ("fold_kernel", ("OUT", "X"), (), {}),
    "muon_prologue": (
        "prologue_kernel", ("G", "B", "U"), (("sums", "*fp64"),), {"NESTEROV": True, **FLAGS}
    ),
}  # fmt: skip


def passes(arch: str) -> Iterator[Build]:
    """Yield the passes over dense, aligned tensors in bfloat16 and float32."""
    tables, each = module("tables"), module("elementwise")
    block = each.block_of(each.torch.device("cuda"))
    for op, (name, tensors, arguments, own) in PASSES.items():
        for dtype in (each.torch.bfloat16, each.torch.float32):
            fixed = {t: each.torch.uint8 for t in tensors if t.endswith("CODES")}
            fixed |= {t: each.torch.float32 for t in tensors if t.endswith("SCALES")}
            if "R" in tensors:  # mantissas, beside weights of bfloat16
                fixed |= {"W": each.torch.bfloat16, "R": each.torch.int16}
            types = {f"{t}_TYPE": tables.TYPES[fixed.get(t, dtype)] for t in tensors}
            home = module(re.sub("_fold|_rounded|_halves|_peaks", "", op))
            constants = dict(
                STEPS=7, **types, WIDE=each.tl.float32, FLAT=True,
                BLOCK=getattr(home, "BLOCK", block), **own,
            )  # fmt: skip
            kernel = getattr(home, name)
            yield Build(
                op, kernel, constants, each.OPTIONS, arch,
                str(dtype).removeprefix("torch."), False, arguments,
            )  # fmt: skip


# by reduction along lines: its module and kernel, further constants, and True if a program owns
# many lines
LINES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "row_moment": ("lines", "moments_kernel", {"EPS_AT": 0, "parts": None}, False),
    "rescale": ("lines", "rescale_kernel", {"KEEP_NORM": True}, False),
    "row_normalize": ("lines", "normalize_kernel", {"EPS_AT": 0}, False),
    "accumulate": ("accumulate", "accumulate_kernel", {}, False),
    "take_rows": ("take_rows", "take_kernel", {}, False),
    "factored_sums": ("lines", "moments_kernel", {"EPS_AT": 3}, True),
    "factored_norm": (
        "factored_moment", "factored_kernel", {"EPS_AT": 0, "KEEP_NORM": True, "WRITE": False}, True
    ),
    "factored_moment": (
        "factored_moment", "factored_kernel", {"EPS_AT": 0, "KEEP_NORM": True, "WRITE": True}, True
    ),
}  # fmt: skip


def reductions(arch: str) -> Iterator[Build]:
    """Yield the reductions along rows (order 1) and columns (order 0) in bfloat16 and float32."""
    tables, lines = module("tables"), module("lines")
    names = ("factors", "sums", "row_moments", "column_moments", "parts", "moments", "whole")
    doubles = tuple((n, "*fp64") for n in (*names, "totals"))
    for dtype in (lines.torch.bfloat16, lines.torch.float32):
        t, label = tables.TYPES[dtype], str(dtype).removeprefix("torch.")
        for op, (name, kernel, own, many) in LINES.items():
            for order in (1, 0):
                across, along = lines.blocks_of(lines.torch.device("cuda"), order, many)
                second = {
                    "row_normalize": {"OUT_TYPE": t}, "take_rows": {"OUT_TYPE": t},
                    "accumulate": {"S_TYPE": t, "Z_TYPE": lines.tl.float64},
                }.get(op, {"V_TYPE": t})  # fmt: skip
                constants = dict(
                    STEPS=7, X_TYPE=t, **second, WIDE=lines.tl.float32, X_ORDER=order,
                    ALIGNED=True, LINES=across, ALONG=along, **own,
                )  # fmt: skip
                yield Build(
                    op if order else op.replace("row", "column") + "_across",
                    getattr(module(name), kernel), constants,
                    lines.options(across, along), arch, label, False, doubles,
                    wide=order == 1 or op != "take_rows",  # columns here and there are not wide
                )  # fmt: skip
        for order in (1, 0):
            across, along = lines.blocks_of(lines.torch.device("cuda"), order)
            yield Build(
                f"normuon_update{'' if order else '_across'}",
                module("normuon_step").normalized_update_kernel,
                dict(STEPS=7, W_TYPE=t, X_TYPE=t, WIDE=lines.tl.float32, X_ORDER=order,
                     ALIGNED=True, LINES=across, ALONG=along),
                lines.options(across, along), arch, label, False, doubles,
            )  # fmt: skip
            yield Build(
                f"normuon_moments{'' if order else '_across'}",
                module("normuon_step").row_moments_kernel,
                {"STEPS": 7, "V_TYPE": t, "LINES": across}, lines.OPTIONS, arch, label, False,
                (*doubles[:2], ("parts", "*fp32")), wide=False,
            )  # fmt: skip
        yield Build(
            "factored_columns", module("factored_moment").columns_kernel,
            {"STEPS": 7, "V_TYPE": t, "WIDE": lines.tl.float32}, lines.OPTIONS, arch, label, False,
            doubles, wide=False,
        )  # fmt: skip
        yield Build(
            "totals", module("totals").totals_kernel, {"STEPS": 7, "NUMBERS": 3}, lines.OPTIONS,
            arch, label, False, doubles, wide=False,
        )  # fmt: skip


# by kernel of power iteration: its types and further constants
POWER: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "step_kernel": (("W_TYPE",), {"STEPS": 7, "ALIGNED": True, "SECOND": True}),
    "back_kernel": (("W_TYPE",), {"STEPS": 7}),
    "vectors_kernel": ((), {"STEPS": 7}),
    "start_kernel": (("U_TYPE", "V_TYPE"), {"STEPS": 7}),
    "end_kernel": (("U_TYPE", "V_TYPE"), {"STEPS": 7, "MOVED": True}),
    "norms_kernel": ((), {"STEPS": 7, "CHUNK": 256, "ROOT": True}),
    "powers_kernel": ((), {"STEPS": 7, "CHUNK": 256}),
}


def power(arch: str) -> Iterator[Build]:
    """Yield the kernels of power iteration on rows (order 1) and columns (order 0) of W."""
    tables, kernels = module("tables"), module("power_iteration")
    doubles = tuple((n, "*fp64") for n in ("powers", "y_squares", "z_squares", "sums", "norms"))
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
                    (*doubles, ("replaced", "*i32"), ("peaks", "*i32")), name == "step_kernel",
                )  # fmt: skip


ANYHOW = {"FLAT": False, "ALIGNED": False}  # with order 2: neither stride is known to be 1


def anyhow(build: Build) -> Build:
    """Return the same launch for tensors of any strides and alignment."""
    orders = {name: 2 for name in build.constants if name.endswith("ORDER")}
    slower = {name: value for name, value in ANYHOW.items() if name in build.constants}
    constants = build.constants | orders | slower
    return replace(build, op=f"{build.op}-anyhow", constants=constants, wide=False)


def builds(arch: str) -> Iterator[Build]:
    """Yield all launches that the package may make on an architecture.

    Each is built for contiguous and aligned tensors, and many in bfloat16 also for any others.
    """
    for family in (products, small, passes, reductions, power):
        for build in family(arch):
            yield build
            once = build.op not in ("gram-tall", "apply-tall") and not build.op.endswith("_across")
            once = once and (build.op.startswith("small") or build.tile <= 64 * 64)
            if once and build.dtype == "bfloat16" and (ANYHOW.keys() & build.constants.keys()):
                yield anyhow(build)
