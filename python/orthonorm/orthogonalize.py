"""Choice of the form and dtype in which a matrix is iterated, by measured rates (`rates.json`).

direct   `ops.direct_polynomial`: A = X X^T;  X <- a X + (b A + c A^2) X         per iteration
gram     `ops.gram_form`: X <- Q X with Q = `gram_polynomial(X X^T)`, in segments between restarts
         (Gram Newton-Schulz, Dao-AILab; reads the long side once per segment)

A row of the table belongs to a class of processors. It holds GFLOP/s by the short side of the
matrix, for each part of the work: "direct", the "chain" on the Gram matrix, the "sweep" from X to
the Gram matrix and back, and "torch", the function of `torch.optim.Muon`.
`python -m orthonorm.bench.tune` measures a row; rows that are estimates say so.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.words import SMALL, Triple, Triples, fits

Rates = dict[str, list[float]]


class Choice(NamedTuple):
    """Form and dtype of one matrix; `small` is True if the kernel for small matrices serves it."""

    form: str  # "direct" or "gram"
    dtype: torch.dtype
    small: bool


def choose(X: Tensor, triples: Triples, restarts: list[int], form: str, precision: str) -> Choice:
    """Choose the most accurate form and dtype that is no slower than `torch.optim.Muon`'s function.

    If none is, choose the fastest. `form` and `precision` limit the choice if they are not "auto".
    On accelerators precision="auto" is float16. Costs are compared only if more than one choice is
    left, because under torch.compile every comparison of sizes is a guard.
    """
    n, m = sorted(X.shape[-2:])
    numbers = (n, m, X.dtype, X.device.type == "cpu", tuple(triples), tuple(restarts))
    symbolic = not (isinstance(n, int) and isinstance(m, int))
    return (_choice if symbolic else _kept_choice)(*numbers, form, precision)


def _choice(
    n: Any, m: Any, given: torch.dtype, on_cpu: bool, triples: Sequence[Triple],
    restarts: Sequence[int], form: str, precision: str,
) -> Choice:  # fmt: skip
    """Choose from numbers alone: sides n <= m, the given dtype and where the matrix is."""
    small = form != "gram" and (fits(n, m) if on_cpu else m <= SMALL)
    if precision not in ("auto", "full"):
        dtypes = [getattr(torch, precision)]
    elif given == torch.float64:
        dtypes = [torch.float64]
    elif precision == "full":
        dtypes = [torch.float32]
    elif not on_cpu:
        dtypes = [torch.float16]
    else:
        dtypes = [torch.float32, torch.bfloat16]
    if small or n == 0:
        return Choice("direct" if form == "auto" else form, dtypes[0], small)
    forms = ["direct", "gram"] if form == "auto" else [form]
    if form == "auto" and (len(triples) == 1 or (dtypes == [torch.bfloat16] and not on_cpu)):
        forms = ["direct"]
    if len(forms) * len(dtypes) == 1:
        return Choice(forms[0], dtypes[0], False)
    rates = table()[processor() if on_cpu else "accelerator"]
    limit = _work(m / n, triples, 4, 2) / _rate(rates, "torch", n)
    best = None
    for dtype in dtypes:
        costs = {f: _cost(rates, f, dtype, n, m, triples, restarts) for f in forms}
        fastest = min(forms, key=costs.__getitem__)
        if best is None or costs[fastest] < best[0]:
            best = costs[fastest], Choice(fastest, dtype, False)
        if costs[fastest] <= limit:
            return Choice(fastest, dtype, False)
    assert best is not None
    return best[1]


_kept_choice = lru_cache(maxsize=4096)(_choice)  # symbolic sizes cannot be keys


# ---- costs: operations divided by rates ----------------------------------------------------------
def _work(aspect: Any, triples: Sequence[Triple], long: int, square: int) -> Any:
    """Return the operations of a direct form divided by n^3, n the short side.

    Per step there are `long` times aspect, and `square` more if c is not 0. Symmetric products
    count half.
    """
    return sum(long * aspect + (square if c else 0) for _, _, c in triples)


def work(aspect: float, triples: Sequence[Triple], restarts: Sequence[int]) -> dict[str, float]:
    """Return the operations of each part of the work, divided by n^3."""
    sweeps = 1 + len(restarts)
    return {
        "direct": _work(aspect, triples, 3, 1),
        "chain": _work(1, triples, 3, 1) - 3 * sweeps,
        "sweep": 3 * aspect * sweeps,
        "torch": _work(aspect, triples, 4, 2),
    }


def _cost(
    rates: Rates, form: str, dtype: torch.dtype, n: int, m: int, triples: Sequence[Triple],
    restarts: Sequence[int],
) -> Any:  # fmt: skip
    """Return the time of a form in a dtype, in units of n^3 / GFLOP/s."""
    kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
    parts = work(m / n, triples, restarts)
    if form == "direct":
        return parts["direct"] / _rate(rates, f"direct {kind}", n)
    chain = parts["chain"] / _rate(rates, "chain", n)
    return chain + parts["sweep"] / _rate(rates, f"sweep {kind}", n)


def _rate(rates: Rates, name: str, n: int) -> float:
    """Return the rate at the nearest short side of the table."""
    sides = rates["sides"]
    bounds = [(a * b) ** 0.5 for a, b in itertools.pairwise(sides)]
    return rates[name][sum(n > bound for bound in bounds)]


# ---- the table -----------------------------------------------------------------------------------
@lru_cache
def table() -> dict[str, Rates]:
    """Return the rows of rates.json by class of processor."""
    stored = json.loads((Path(__file__).parent / "rates.json").read_text())
    return {name: row["rates"] for name, row in stored.items()}


@lru_cache
def processor() -> str:
    """Return the name of the table's row for this processor and ORTHONORM_ISA."""
    wish = os.environ.get("ORTHONORM_ISA")  # as csrc/cpu/isa.h: it may only lower
    if wish in ("portable", "avx2", "avx512") or not torch.cpu._is_avx512_bf16_supported():
        return "other"
    amx = wish != "avx512bf16" and torch.cpu._is_amx_tile_supported()
    return "amx" if amx else "avx512bf16"
