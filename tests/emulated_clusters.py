"""Polynomials across clusters of blocks on the CPU: few sides, as every call runs 1024 or 2048
threads; strips of fewer rows are in `csrc/tests/cuda_on_cpu/test_small.cpp`.

Run by `test_cuda_on_cpu.py` after `emulated_cuda.py`, which loads the library.
"""

from __future__ import annotations

from typing import Any

import emulated_cuda
import pytest
import test_ops
import torch
from guards import check_bands
from orthonorm._library import library_part
from orthonorm.bench.cases import CASES, Case
from orthonorm.bench.inputs import Inputs, map_tensors
from orthonorm.bench.makers import KELLER
from test_ops import check_numbers, made, run

assert emulated_cuda.PARTS
GRAM, DIRECT = (CASES[name] for name in ("gram_polynomial", "direct_polynomial"))
CUBIC = [1.5, -0.5, 0.0] * 2


@pytest.mark.parametrize(
    ("case", "shape", "dtype", "coefficients"),
    [
        (GRAM, (129, 129), "float16", KELLER[:6]),
        (GRAM, (200, 200), "bfloat16", CUBIC),
        (GRAM, (255, 255), "float16", KELLER[:3]),
        (DIRECT, (1, 1), "float16", KELLER[:6]),
        (DIRECT, (2, 2, 35, 16), "bfloat16", KELLER[:6]),
        (DIRECT, (129, 200), "float16", KELLER[:3]),
        (DIRECT, (255, 131), "bfloat16", CUBIC[:3]),
    ],
)
def test_four_blocks(case: Case, shape: Any, dtype: str, coefficients: list[float]) -> None:
    check_numbers(case, (shape,), Inputs.named(dtype), coefficients=coefficients)


@pytest.mark.parametrize(
    ("case", "shape", "coefficients"),
    [(GRAM, (300, 300), KELLER[:3]), (DIRECT, (300, 260), CUBIC[:3])],
)
def test_eight_blocks(case: Case, shape: Any, coefficients: list[float]) -> None:
    """Beyond what the op gives this kernel."""
    inputs = Inputs.named("float16")
    check_numbers(case, (shape,), inputs, library_part(case.op), coefficients=coefficients)


def test_all_rows_of_eight_blocks() -> None:
    """A diagonal matrix stays one, of the polynomial of its numbers."""
    x = torch.linspace(-1, 1, 512).half()
    Q = library_part(GRAM.op)(torch.diag(x), KELLER[:3])
    a, b, c = KELLER[:3]
    z = (b * x.float() + c * x.float().square()).half().float()
    assert torch.equal(Q, torch.diag((a + z).half()))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_layout(layout: str) -> None:
    inputs = Inputs.named("float16", layout=layout)
    check_numbers(DIRECT, ((2, 19, 33),), inputs, coefficients=KELLER[:3])
    check_numbers(GRAM, ((130, 130),), inputs, coefficients=KELLER[:3])


def test_bands() -> None:
    check_bands(DIRECT, ((2, 41, 70),), Inputs.named("float16"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches(count: int) -> None:
    """Each matrix is what it is alone; zeros are 0 or a multiple of I, NaN stays in its matrix."""
    for case, shape in ((GRAM, (count, 129, 129)), (DIRECT, (count, 20, 140))):
        arguments = made(case, (shape,), Inputs.named("bfloat16"), coefficients=KELLER[:3])
        name = "R" if case is GRAM else "X"
        (clean,) = run(case, case.op, arguments)["result"]
        assert clean.shape == shape
        if count < 3:
            continue
        special = map_tensors(arguments, torch.clone)
        special[name][0] = 0
        special[name][1, 7, 5] = float("nan")
        (got,) = run(case, case.op, special)["result"]
        zero = torch.eye(129).bfloat16() * KELLER[0] if case is GRAM else torch.zeros(20, 140)
        assert torch.equal(got[0], zero.bfloat16())
        assert bool(got[1].isnan().any())
        assert torch.equal(got[2], clean[2])
        alone = run(case, case.op, {**arguments, name: arguments[name][2]})["result"]
        assert torch.equal(alone[0], clean[2])


def test_empty() -> None:
    for shape in test_ops.EMPTY:
        test_ops.test_empty(DIRECT, shape, "float16")


@pytest.mark.parametrize(
    ("case", "X", "rule"),
    [
        (GRAM, torch.zeros(513, 513), "sides of at most 512, got .513, 513."),
        (GRAM, torch.zeros(140, 150), "square and have sides of at most 512, got .140, 150."),
        (DIRECT, torch.zeros(100, 513), "sides of at most 512, got .100, 513."),
        (DIRECT, torch.zeros(7), "at least 2 dimensions, got shape .7."),
        (GRAM, torch.zeros(3, 3).double(), "must be float16 or bfloat16"),
    ],
)
def test_refused(case: Case, X: torch.Tensor, rule: str) -> None:
    unchecked = getattr(torch.ops.orthonorm, case.name).part
    with pytest.raises(RuntimeError, match=f"{case.name}: [RX].* {rule}"):
        unchecked(X if X.dtype == torch.float64 else X.half(), KELLER)
    with pytest.raises(ValueError, match=f"{case.name}: coefficients must be .* at most 128 it"):
        unchecked(torch.zeros(2, 2).half(), KELLER * 26)
