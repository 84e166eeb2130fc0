"""What serves which op where: `docs/support.md`, from the case table, the sources and the registry.

`python -m orthonorm bench results` writes it; a test holds it to them.
"""

from __future__ import annotations

from pathlib import Path

from orthonorm._library import OPS
from orthonorm.optim import REGISTRY

from .cases import CASES, Case

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"

LEAD = """# What is supported where

Written by `make results` from the case table, the sources and the registry of optimizers.

**Ops.** On a CPU the C++ kernel serves, where the library was built. On CUDA the C++ kernel serves
where one was built (nvcc and a CUDA build of torch), else Triton's. "composite" are ops that call
other ops, whose kernels serve them. Everything else, on every device of torch, is served by the
op's definition in plain torch, as are float64 products on CUDA. "all" dtypes are float32, bfloat16,
float16 and float64; "mixed" ops also take lists whose tensors differ in dtype.

The tests run every op in each of these dtypes on the CPU; the CUDA C++ kernels by an emulation on
the CPU, and Triton's by its interpreter. Both are compiled for sm_80, sm_90 and sm_100.
"""
OPTIMIZERS = """
**Optimizers.** All take these four dtypes, DDP and DTensors (FSDP2, HSDP, tensor parallel, both).
Of a matrix that is cut, what is named here travels to the rank that computes its step.
"""


def yes(it_is: bool) -> str:
    return "yes" if it_is else ""


def op_row(case: Case) -> tuple[str, ...]:
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
    """The text of docs/support.md."""
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
