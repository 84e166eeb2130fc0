"""Generator of `docs/support.md`, the page that says which backend serves which op.

It reads the case table, the sources and the registry of optimizers. `python -m orthonorm bench
results` writes the page, and a test checks that it is up to date.
"""

from __future__ import annotations

from pathlib import Path

from orthonorm._library import OPS
from orthonorm.optim import REGISTRY

from .cases import CASES, Case

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"

LEAD = """# What is supported where

`make results` writes this page from the case table, the sources and the registry of optimizers.

**Ops.** On CPUs the C++ kernel serves an op if the library was built. On CUDA the C++ kernel serves
it if one was built (which takes nvcc and a CUDA build of torch), otherwise Triton's. A "composite"
op calls other ops, whose kernels serve it. In all other cases, and on every other device of torch,
the op's definition in plain torch serves it; it also serves float64 products on CUDA. "all" dtypes
are float32, bfloat16, float16 and float64. "mixed" ops also take lists whose tensors differ in
dtype.

The tests run every op in each of these dtypes on the CPU. They run the CUDA C++ kernels in an
emulation on the CPU, and Triton's kernels in its interpreter. Both are also compiled for sm_80,
sm_90 and sm_100.
"""
OPTIMIZERS = """
**Optimizers.** All take these four dtypes, DDP, and DTensors (FSDP2, HSDP, tensor parallelism, or
FSDP2 with tensor parallelism). If a matrix is cut among ranks, the tensors in the column "travels"
are sent to the rank that computes its step.
"""


def yes(it_is: bool) -> str:
    """Return "yes" or ""."""
    return "yes" if it_is else ""


def op_row(case: Case) -> tuple[str, ...]:
    """Return the table's cells of an op, from the files that its kernels would be in."""
    composite = "composite" if OPS[case.name].composite else ""
    cpu = (ROOT / "csrc" / "cpu" / f"{case.name}.cpp").exists()
    cuda = (ROOT / "csrc" / "cuda" / f"{case.name}.cu").exists()
    triton = (ROOT / "kernels" / f"{case.name.rstrip('_')}.py").exists()
    return (
        f"`{case.name}`", "C++" if cpu else composite, "C++" if cuda else "",
        "Triton" if triton else composite, "all, mixed" if "mixed" in case.dtypes else "all",
        yes(case.takes_list),
    )  # fmt: skip


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def page() -> str:
    """Return the text of docs/support.md."""
    head = ("op", "CPU", "CUDA", "CUDA, not built", "dtypes", "takes lists")
    ops = table(head, [op_row(case) for case in CASES.values()])
    rows = [
        (
            f"`{name}`",
            "update" if cls.self_contained else "update, weight, state",
            ", ".join(cls.decays),
        )
        for name, cls in sorted(REGISTRY.items(), key=lambda item: item[0].lower())
        if name != "AdamW"
    ]
    optimizers = table(("optimizer", "travels", "decay"), rows)
    return f"{LEAD}\n{ops}\n{OPTIMIZERS}\n{optimizers}\n"
